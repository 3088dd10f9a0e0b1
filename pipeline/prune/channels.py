"""Whole channels: how many units of each group a budget keeps, and which.

Allocations share out units as they share out weights: a group of channels (`pipeline.network.groups`) stands where a
tensor stands otherwise, and a unit where a weight does. What the tensors then cost follows from the counts of all
groups together, since a weight stays where both of its channels stay. The plan is the largest share of units whose cost
is within the budget (`plan`), or the units of least predicted damage (`solve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.network.cost import Quantity, amount
from pipeline.network.groups import Flags, Group, Groups, find
from pipeline.network.survey import Prunable
from pipeline.prune import allocation, limits, patterns
from pipeline.prune import budget as budgeting
from pipeline.prune.allocation import Request
from pipeline.prune.budget import Composed, Cost, Priced, Solution
from pipeline.prune.masks import top_mask
from pipeline.settings.pruning import Prune

Price = Callable[[Mapping[str, int]], int]  # the kept units of each group -> what they cost together; never falls
TRIES = 4  # times that groups are priced beside each other
KNOTS = 17  # counts at which a group is priced


def groups_of(model: nn.Module, prunable: Sequence[Prunable], example: Tensor, prune: Prune) -> Groups | None:
    """The groups of a network's channels, where the settings prune whole channels; `example` is a batch of inputs."""
    if not patterns.of(prune).channels:
        return None
    return find(model, example, {tensor.name: tensor.shape for tensor in prunable})


def scores(groups: Groups, ranking: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The score of each unit of each group, (units,) float64, by group."""
    return {name: unit_scores(group, ranking) for name, group in groups.by_name.items()}


def unit_scores(group: Group, ranking: Mapping[str, Tensor]) -> Tensor:
    """The score of each unit, (units,) float64 on the CPU: the mean of the scores of its weights in each tensor.

    Each tensor's scores are divided by their mean first, so that tensors and groups of different sizes and scales count
    alike.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        score = ranking[member.tensor].detach().double().cpu()
        lines = score.mean(dim=[axis for axis in range(score.ndim) if axis != member.axis])
        total += lines[torch.from_numpy(member.places)].mean(1) / (float(score.mean()) or 1.0)
    return total / len(group.members)


def spread(group: Group, tensor: str, steps: Tensor, most: int, like: Tensor) -> Tensor:
    """The steps of a group's units, (units,) uint8, at the weights of one of its tensors: shaped as `like`, uint8.

    A weight has the least of its two channels, and `most` where neither is of the group.
    """
    made = torch.full(like.shape, most, dtype=torch.uint8)
    for member in group.members:
        if member.tensor == tensor:
            line = torch.full((like.shape[member.axis],), most, dtype=torch.uint8)
            line[torch.from_numpy(member.places)] = steps[:, None]
            made = torch.minimum(made, line.view([-1 if axis == member.axis else 1 for axis in range(like.ndim)]))
    return made.to(like.device)


def bounds(prune: Prune, alive: Mapping[str, Flags]) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most units of each group, as the settings have them; each group keeps one at the least."""
    units = {name: len(flags) for name, flags in alive.items()}
    living = {name: int(flags.sum()) for name, flags in alive.items()}
    return limits.bounds(units, living, max(1, prune.min_weights), prune.floors, prune.ceilings)


def by_tensor(groups: Groups, costs: Mapping[str, Cost]) -> Price:
    """The price that adds up what each prunable tensor costs, by its kept weights."""
    return lambda keep: limits.spent(groups.counts(keep), costs)


def plan(
    prune: Prune, groups: Groups, units: Mapping[str, Tensor], alive: Mapping[str, Flags], budget: int,
    price: Price, densities: dict[str, float] | None = None, unit: Quantity = "weights",
) -> dict[str, int]:  # fmt: skip
    """How many units each group keeps, so that they cost `budget` at most, by no more than one unit less.

    `units` are the units' scores. `densities` are those of `explicit`, by group, which uses no budget. An allocation by
    predicted damage is `solve`'s. Raises UserError where even the fewest units cost more.
    """
    least, most = bounds(prune, alive)
    flags = {name: torch.from_numpy(each) for name, each in alive.items()}

    def shared(number: int) -> dict[str, int]:
        request = Request(dict(units), flags, number, least, most, densities=densities)
        return allocation.allocate(prune.allocation, request, prune.min_weights)

    if allocation.of(prune).fixes_densities:
        return shared(0)
    require_possible(groups, least, budget, price, prune.pattern, unit)
    low, high = sum(least.values()), sum(most.values())
    return shared(_largest(low, high, lambda number: price(shared(number)) <= budget))


def solve(damages: Composed, least: Mapping[str, int], most: Mapping[str, int], budget: int, price: Price) -> Solution:
    """The least predicted damage that is found within `least`, `most` and the budget, which must pay for `least`.

    What a unit costs depends on the other groups: a weight goes with either of its channels. So the groups are priced
    one at a time beside the others as they are, the hull is solved at these prices, and the groups are priced again
    beside what it keeps (`TRIES` times; the best is taken). Only the prices by which groups are weighed are
    approximate: for each of these answers the budget is met by the price of all groups together, and no further unit of
    any group would fit. The solution's bound holds at its own prices.
    """
    beside, best = dict(most), None
    for _ in range(TRIES):
        own = {name: _own(price, beside, name, least[name], most[name]) for name in beside}
        spend = damages.at_prices(own).within(least, most)
        low, high = (sum(own[name](count) for name, count in end.items()) for end in (least, most))
        found = spend(_largest(low, high, partial(_fits, spend, price, budget)))
        curves = damages.by_power[found.held.power]
        keep = _filled(found.keep, most, budget, price, curves)
        damage = budgeting.predicted(curves, keep)
        found = replace(found, keep=keep, spent=price(keep), damage=damage, bound=min(found.bound, damage))
        if best is None or found.held.rise(found.damage) < best.held.rise(best.damage):
            best = found
        beside = keep
    assert best is not None
    return best


def _fits(spend: Callable[[int], Solution], price: Price, budget: int, money: int) -> bool:
    """Whether what so much money keeps is within the budget by the price of all groups together."""
    return price(spend(money).keep) <= budget


def _own(price: Price, beside: Mapping[str, int], name: str, least: int, most: int) -> Cost:
    """What so many units of one group cost beside the others as they are: exact at `KNOTS` counts, linear between."""
    counts = np.unique(np.linspace(least, most, KNOTS).round().astype(np.int64))
    costs = np.array([price({**beside, name: count}) for count in counts.tolist()], np.float64)
    costs = np.maximum.accumulate(costs - costs[0])
    return lambda count: int(np.interp(count, counts, costs))


def _filled(
    keep: Mapping[str, int], most: Mapping[str, int], budget: int, price: Price, curves: Mapping[str, Priced]
) -> dict[str, int]:
    """More units, as long as one fits: each time the one that saves the most damage for what it costs."""
    made, spent = dict(keep), price(keep)
    while True:
        best: tuple[float, str, int] | None = None
        for name, count in made.items():
            cost = price({**made, name: count + 1}) if count < most[name] else budget + 1
            if cost <= budget:
                saved = float(curves[name].curve.at(count) - curves[name].curve.at(count + 1))
                worth = saved / max(cost - spent, budgeting.FREE)
                best = max(best, (worth, name, cost)) if best else (worth, name, cost)
        if best is None:
            return made
        made[best[1]] += 1
        spent = best[2]


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from low to high that fits, where low does and all below one that fits do."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def require_possible(
    groups: Groups, least: Mapping[str, int], budget: int, price: Price, pattern: str, unit: Quantity = "weights"
) -> None:
    """Raise UserError where there are no groups, or where their fewest units cost more than the budget."""
    require_some(groups, f"prune.pattern={pattern}")
    cheapest = price(least)
    if cheapest > budget:
        given, remedy = "target.compression or prune.list", "lower target.compression"
        if unit == "latency":
            given, remedy = f"target.latency_ms, {given}", "raise target.latency_ms, or lower target.compression"
        raise UserError(
            f"prune.pattern={pattern}: the fewest channels cost {amount(cheapest, unit)}, more than the budget of "
            f"{amount(budget, unit)} ({given}): {remedy}, prune.min_weights or prune.floors. What is in no group of "
            "channels stays whole; `secateur plan` lists the groups"
        )


def require_some(groups: Groups, what: str) -> None:
    """Raise UserError, in a sentence that begins with `what`, where no channel can be removed."""
    if not groups.by_name:
        why = "; ".join(groups.notes[:3]) or "all are inputs or outputs"
        raise UserError(f"{what}: no channel of this network can be removed: {why}")


def require_whole(groups: Groups, alive: Mapping[str, Flags], masks: Mapping[str, Tensor], pattern: str) -> None:
    """Raise UserError where masks also leave out weights whose channels stay: a round of channels would revive them."""
    for name, mask in groups.masks(alive).items():
        if bool((mask & ~masks[name].cpu()).any()):
            raise UserError(
                f"prune.pattern={pattern}: single weights of {name} are pruned already, and whole channels would bring "
                "them back: let start.from name round 0, or a round that pruned channels"
            )


def masks(
    groups: Groups, units: Mapping[str, Tensor], alive: Mapping[str, Flags], keep: Mapping[str, int]
) -> dict[str, Tensor]:
    """The masks of all prunable tensors that keep the highest `keep` units of each group, bool on the CPU."""
    kept = {
        name: top_mask(units[name], torch.from_numpy(np.ascontiguousarray(alive[name])), keep[name]).numpy()
        for name in groups.by_name
    }
    return groups.masks(kept)
