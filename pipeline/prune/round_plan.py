"""What one round is to keep: exact counts, fixed before anything of it is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.network import cost
from pipeline.network.groups import Groups
from pipeline.prune import allocation, channels, criteria, damage, limits, patterns, schedules
from pipeline.prune import budget as budgeting
from pipeline.prune.allocation import Request, sigma
from pipeline.prune.budget import Composed, Cost, Held, Priced, Solution
from pipeline.run.records import GroupPlan, Prediction, RoundPlan, Scan, TensorPlan, TogetherRow
from pipeline.settings.pruning import Prune, Target


@dataclass(frozen=True)
class Goal:
    """What an attempt at round `round` (from 1) is to reach: `budget` weights, which is `density` of all prunable ones.

    `generation` counts rounds from the dense network on, also those of the runs that this one branched off from.
    """

    round: int
    attempt: int
    density: float
    budget: int
    generation: int
    passing: bool = dataclasses.field(default=False, compare=False)

    def at(self, density: float) -> Goal:
        """The goal of a prune on the way to this one, at a larger density, which need not have the pattern yet."""
        budget = max(self.budget, int(self.budget / self.density * density))
        return dataclasses.replace(self, density=density, budget=budget, passing=True)


@dataclass(frozen=True)
class Scanned:
    """What a plan takes from the scan: the paper's qualities, and each tensor's predicted damage with its cost."""

    qualities: dict[str, float]
    damages: Composed

    @property
    def prices(self) -> dict[str, Cost]:
        """What each tensor costs, in the unit target.budget."""
        return self.damages.prices


@dataclass(frozen=True)
class Basis:
    """What every plan of a run rests on: settings, the dense network's weights by tensor, and the scan, if used.

    Where whole channels are pruned also their groups; `price` then says what they cost, in the unit target.budget.
    """

    prune: Prune
    target: Target
    seed: int
    dense: dict[str, Tensor]
    scan: Scanned | None
    groups: Groups | None = None
    price: channels.Price | None = None


@dataclass(frozen=True)
class Standing:
    """The tensors before a prune, by name.

    `alive` is bool, True where a weight has survived the rounds before; `statistics` are what the criterion needs.
    """

    weights: dict[str, Tensor]
    alive: dict[str, Tensor]
    statistics: dict[str, Tensor] | None = None


def densities(prune: Prune, target: Target, start: float = 1.0) -> list[float]:
    """The density after each round of a run whose rounds are fixed beforehand, and begin at density `start`."""
    return schedules.densities(prune, target.final_density, start)


def budget(prune: Prune, target: Target, number: int, total: int, start: float = 1.0) -> int:
    """The budget after round `number` (from 1). `total` is the dense cost in the unit target.budget."""
    compression = None if schedules.of(prune).from_list else target.compression
    return schedules.budgets(densities(prune, target, start), total, compression)[number - 1]


def needs_scan(prune: Prune, target: Target) -> bool:
    """Whether the densities of single tensors follow from the scan."""
    return allocation.of(prune).needs_scan or target.by_thresholds


def uses_scores(prune: Prune, target: Target) -> bool:
    """Whether the densities of single tensors follow from their scores, and so from trained weights."""
    return allocation.of(prune).uses_scores or target.by_thresholds


def costs(unit: cost.Quantity, weights: Mapping[str, int], flops: Mapping[str, int]) -> dict[str, Cost]:
    """What each tensor costs, in the unit target.budget, from its weights and its dense FLOPs."""
    return {name: cost.price(unit, count, flops[name]) for name, count in weights.items()}


def require_possible(
    prune: Prune,
    target: Target,
    weights: Mapping[str, int],
    living: Mapping[str, int],
    flops: Mapping[str, int],
    groups: Groups | None = None,
    price: channels.Price | None = None,
) -> None:
    """Raise UserError, before any training, if a round would keep no weight, or limits rule out the last budget.

    `living` are the most weights of each tensor that the pattern allows; `groups` are those of the channels, where the
    pattern is of whole channels, and `price` what they cost, None where that is not known yet.
    """
    if groups is not None:
        _require_possible_channels(prune, target, groups, price)
        return
    if target.no_loss:  # it stops where no more can go
        return
    require_within_pattern(prune, weights, living)
    prices = costs(target.budget, weights, flops)
    least, most = limits.bounds(weights, living, prune.min_weights, prune.floors, prune.ceilings)
    total = limits.spent(weights, prices)
    last = _budgets(prune, target, total)[-1]
    if not patterns.of(prune).free and not allocation.of(prune).fixes_densities:
        _require_different(prune, target, total, limits.spent(living, prices))
    if target.to_size and not allocation.of(prune).fixes_densities:
        cheapest, dearest = limits.spent(least, prices), limits.spent(most, prices)
        limits.require_possible(last, cheapest, dearest, prune.min_weights, len(weights), target.budget)


def _budgets(prune: Prune, target: Target, total: int) -> list[int]:
    """The budget of each round."""
    return [budget(prune, target, number, total) for number in range(1, len(densities(prune, target)) + 1)]


def _require_possible_channels(prune: Prune, target: Target, groups: Groups, price: channels.Price | None) -> None:
    """Raise UserError where there are no channels to prune, a name fits no group, or the last budget is too small."""
    channels.require_some(groups, f"prune.pattern={prune.pattern}")
    whole = groups.whole
    least, most = channels.bounds(prune, whole)
    if allocation.of(prune).fixes_densities:
        limits.by_name(prune.densities, whole, "prune.densities")
    fixed = target.no_loss or allocation.of(prune).fixes_densities
    if price is None:
        return
    total = price(groups.sizes)
    last = price(most) if fixed else _budgets(prune, target, total)[-1]
    channels.require_possible(groups, least, last, price, prune.pattern, target.budget)


def _require_different(prune: Prune, target: Target, total: int, most: int) -> None:
    """Raise UserError where several rounds plan `most`, what the pattern allows, or more: they would be the same."""

    def same(rounds: int) -> int:
        planned = _budgets(prune.model_copy(update={"rounds": rounds}), target, total)
        return sum(each >= most for each in planned)

    if same(prune.rounds) > 1:
        fewer = next((rounds for rounds in range(prune.rounds, 0, -1) if same(rounds) <= 1), None)
        remedy = "give prune.list only one such density" if fewer is None else f"set prune.rounds={fewer}"
        raise UserError(
            f"prune.pattern={prune.pattern} allows no more than {most:,} {target.budget} from the first round on, and "
            f"{same(prune.rounds)} rounds plan as many or more, so they would be the same: {remedy}"
        )


def require_within_pattern(prune: Prune, weights: Mapping[str, int], living: Mapping[str, int]) -> None:
    """Raise UserError for a floor, or a density of `explicit`, above what the pattern allows a tensor."""
    wanted = {"prune.floors": prune.floors}
    if allocation.of(prune).fixes_densities:
        wanted["prune.densities"] = prune.densities
    for setting, given in wanted.items():
        for name, density in limits.by_name(given, weights, setting).items():
            if limits.nearest(density, weights[name]) > living[name]:
                raise UserError(
                    f"{setting} gives {name} {density:g} of its weights, and prune.pattern={prune.pattern} allows it "
                    f"{living[name] / weights[name]:.3g}: lower it, or leave the tensor dense with prune.exclude"
                )


def scanned(
    unit: cost.Quantity, scan: Scan, classes: int, flops: Mapping[str, int], groups: Groups | None = None
) -> Scanned:
    """What plans take from a scan. `classes` gives the loss at chance; `flops` are the dense tensors' FLOPs.

    A scan of `groups` gives no prices: a group's cost depends on the others, and `channels.solve` finds it.
    """
    sizes = {tensor.name: tensor.weights for tensor in scan.tensors}
    prices = costs(unit, sizes, flops) if groups is None else dict.fromkeys(sizes, int)
    best = damage.best_together(scan.together or ())
    by_power = {
        power: {name: Priced(curve, prices[name]) for name, curve in damage.curves(scan, classes, power).items()}
        for power in {row.power for row in best.values()} or {damage.USUAL_POWER}
    }

    def held(row: TogetherRow, rise: float, error: float) -> Held:
        unscaled = damage.total_rise(budgeting.predicted(by_power[row.power], row.keep), row.power)
        scale, (low, high) = max(rise, damage.FINEST) / max(unscaled, damage.FINEST), damage.interval(row)
        reach = (high - low) / 2  # to either side at least, where the rise was evened out against the other rows
        return Held(row.power, scale, error, max(reach, rise - low), max(reach, high - rise))

    at = {row.density: held(row, rise, error) for row, rise, error in damage.rising(best.values())}
    qualities = {tensor.name: tensor.quality for tensor in scan.tensors}
    return Scanned(qualities, Composed(by_power, at or {1.0: budgeting.USUAL}))


def make(basis: Basis, goal: Goal, standing: Standing) -> RoundPlan:
    """Plan an attempt at a round from the weights as they are; equal inputs give equal plans on every rank.

    Raises UserError for a budget that cannot be met.
    """
    prune, target, scan = basis.prune, basis.target, basis.scan
    weights, alive = standing.weights, standing.alive
    if basis.groups is not None:
        return _of_channels(basis, basis.groups, goal, standing)
    ranking = scores(basis, standing)
    least, most = bounds(prune, alive, goal.passing)
    request = Request(
        scores=ranking,
        alive=alive,
        budget=goal.budget if target.by_thresholds else spendable(basis, goal, alive, most),
        floors=least,
        caps=most,
        sigmas=sigmas(basis, standing),
        qualities=scan.qualities if scan else None,
        densities=explicit_densities(prune, target, goal.density) if allocation.of(prune).fixes_densities else None,
        damages=scan.damages if scan else None,
        unit=target.budget,
    )
    if target.by_thresholds:
        # The paper gives no schedule of qualities over the rounds: round k of K uses k/K of each.
        share = goal.round / len(densities(prune, target))
        scaled = {name: value * share for name, value in (request.qualities or {}).items()}
        keep, spend = allocation.threshold_counts(dataclasses.replace(request, qualities=scaled)), None
    else:
        keep, spend = allocation.allocate(prune.allocation, request, prune.min_weights), request.budget
    pattern = patterns.of(prune)
    assert all(count % pattern.granularity(weights[name].shape) == 0 for name, count in keep.items())
    tensors = tuple(
        TensorPlan(
            name=name,
            weights=weight.numel(),
            keep=keep[name],
            dead=0,
            threshold=allocation.threshold(ranking[name], keep[name], alive[name]) if pattern.free else None,
        )
        for name, weight in weights.items()
    )
    predicted = prediction(basis, keep, (least, most), spend)
    return RoundPlan(
        round=goal.round,
        attempt=goal.attempt,
        planned_density=_planned(basis, goal, keep),
        budget=sum(keep.values()),
        predicted=predicted,
        tensors=tensors,
    )


def _planned(basis: Basis, goal: Goal, keep: Mapping[str, int]) -> float:
    """The share of all prunable weights that a plan aims at; what it keeps, where the goal is not of weights."""
    prune, target = basis.prune, basis.target
    of_weights = target.budget == "weights" and not target.by_thresholds and not allocation.of(prune).fixes_densities
    if of_weights:
        return goal.density
    return sum(keep.values()) / sum(weight.numel() for weight in basis.dense.values())


def _of_channels(basis: Basis, groups: Groups, goal: Goal, standing: Standing) -> RoundPlan:
    """The plan of an attempt that prunes whole channels."""
    prune = basis.prune
    fixed = allocation.of(prune).fixes_densities
    densities = explicit_densities(prune, basis.target, goal.density) if fixed else None
    ranking, alive = channels.scores(groups, scores(basis, standing)), groups.alive(standing.alive)
    channels.require_whole(groups, alive, standing.alive, prune.pattern)
    price, predicted = basis.price, None
    assert price is not None
    if allocation.of(prune).spends_costs:
        assert basis.scan is not None, "allocation 'budget' needs the damage that the scan predicts"
        least, most = channels.bounds(prune, alive)
        channels.require_possible(groups, least, goal.budget, price, prune.pattern, basis.target.budget)
        best = channels.solve(basis.scan.damages, least, most, goal.budget, price)
        keep = best.keep  # its `least` holds at the prices by which the groups were weighed
        predicted = _prediction(basis, best, keep, goal.budget, best.spent)
    else:
        keep = channels.plan(prune, groups, ranking, alive, goal.budget, price, densities, basis.target.budget)
    counts = groups.counts(keep)
    return RoundPlan(
        round=goal.round,
        attempt=goal.attempt,
        planned_density=_planned(basis, goal, counts),
        budget=sum(counts.values()),
        predicted=predicted,
        tensors=tuple(
            TensorPlan(name=name, weights=weight.numel(), keep=counts[name], threshold=None)
            for name, weight in standing.weights.items()
        ),
        groups=tuple(GroupPlan(name, group.units, keep[name]) for name, group in groups.by_name.items()),
    )


def scores(basis: Basis, standing: Standing) -> dict[str, Tensor]:
    """The score of each weight by the criterion, by tensor."""
    return criteria.scores(basis.prune.criterion, standing.weights, basis.seed, standing.statistics)


def masks(basis: Basis, plan: RoundPlan, standing: Standing) -> dict[str, Tensor]:
    """The masks that a plan asks for, made from the weights as they are; bool, by tensor."""
    ranking, alive = scores(basis, standing), standing.alive
    if basis.groups is not None:
        keep = {group.name: group.keep for group in plan.groups}
        units = channels.scores(basis.groups, ranking)
        return channels.masks(basis.groups, units, basis.groups.alive(alive), keep)
    pattern = patterns.of(basis.prune)
    return {name: pattern.mask(ranking[name], alive[name], plan.keep[name]) for name in standing.weights}


def sigmas(basis: Basis, standing: Standing) -> dict[str, float]:
    """Each tensor's standard deviation: of the dense weights, or of those that have survived (prune.sigma)."""
    if basis.prune.sigma == "renewed":
        return {name: sigma(weight[standing.alive[name]]) for name, weight in standing.weights.items()}
    return {name: sigma(basis.dense[name]) for name in standing.weights}


def spendable(basis: Basis, goal: Goal, alive: Mapping[str, Tensor], caps: Mapping[str, int]) -> int:
    """The budget of an attempt, or the cost of all weights that it may keep where that is less.

    It can be less after dead units were removed, where ceilings are tight before the last round, or where the network
    was given with fewer weights.
    """
    prune, target, scan = basis.prune, basis.target, basis.scan
    prices = scan.prices if scan and allocation.of(prune).spends_costs else {}
    last = target.to_size and goal.density == densities(prune, target)[-1]
    few = limits.spent(living(prune, alive, goal.passing), prices) < goal.budget
    if prune.dead_neurons or not last or few:
        return min(goal.budget, limits.spent(caps, prices))
    return goal.budget


def bounds(prune: Prune, alive: Mapping[str, Tensor], passing: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most weights of each tensor, as the settings have them."""
    sizes = {name: mask.numel() for name, mask in alive.items()}
    return limits.bounds(sizes, living(prune, alive, passing), prune.min_weights, prune.floors, prune.ceilings)


def living(prune: Prune, alive: Mapping[str, Tensor], passing: bool = False) -> dict[str, int]:
    """How many of the weights that are alive a prune may keep of each tensor: all, or those that the pattern allows."""
    pattern = patterns.of(prune)
    return {name: int(mask.sum()) if passing else pattern.most(mask) for name, mask in alive.items()}


def prediction(
    basis: Basis, keep: dict[str, int], within: tuple[dict[str, int], dict[str, int]], spend: int | None
) -> Prediction | None:
    """The scan's prediction for these counts before retraining; None without a scan.

    `within` are the `bounds`; `spend` is the budget, None where there was none.
    """
    scan = basis.scan
    if scan is None:
        return None
    spent = limits.spent(keep, scan.prices)
    money = spend if spend is not None and allocation.of(basis.prune).spends_costs else spent
    best = scan.damages.within(*within)(money)
    return _prediction(basis, best, keep, money, spent)


def _prediction(basis: Basis, best: Solution, keep: Mapping[str, int], budget: int, spent: int) -> Prediction:
    """What the scan predicts for these counts, which cost `spent`, beside the best that `budget` buys."""
    assert basis.scan is not None
    return Prediction(
        unit=basis.target.budget,
        budget=budget,
        spent=spent,
        rise=best.rise_of(budgeting.predicted(basis.scan.damages.by_power[best.held.power], keep)),
        least=best.least,
        power=best.held.power,
        scale=best.held.scale,
    )


def explicit_densities(prune: Prune, target: Target, density: float) -> dict[str, float]:
    """The explicit densities at the time when the whole network is at `density`: all fall geometrically together."""
    final = densities(prune, target)[-1]
    progress = math.log(density) / math.log(final) if final < 1.0 else 1.0
    return {name: value**progress for name, value in prune.densities.items()}
