"""What one round is to keep: exact counts, fixed before anything of it is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.network import cost
from pipeline.prune import allocation, criteria, damage, limits, schedules
from pipeline.prune import budget as budgeting
from pipeline.prune.allocation import sigma
from pipeline.prune.budget import Composed, Cost, Held, Priced
from pipeline.run.records import Prediction, RoundPlan, TensorPlan
from pipeline.settings.config import Config


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

    def at(self, density: float) -> Goal:
        """The goal of a prune on the way to this one, at a larger density."""
        return dataclasses.replace(
            self, density=density, budget=max(self.budget, int(self.budget / self.density * density))
        )


@dataclass(frozen=True)
class Scanned:
    """What a plan takes from the scan: the paper's qualities, and each tensor's predicted damage with its cost."""

    qualities: dict[str, float]
    damages: Composed

    @property
    def prices(self) -> dict[str, Cost]:
        """What each tensor costs, in what target.budget counts."""
        return self.damages.prices


def densities(config: Config, start: float = 1.0) -> list[float]:
    """The density after each round of a run whose rounds are fixed beforehand, and begin at density `start`."""
    return schedules.densities(config.prune, config.target.final_density, start)


def budget(config: Config, number: int, total: int, start: float = 1.0) -> int:
    """What the tensors may cost after round `number` (from 1), of a `total` of what target.budget counts."""
    compression = None if config.prune.schedule == "list" else config.target.compression
    return schedules.budgets(densities(config, start), total, compression)[number - 1]


def needs_scan(config: Config) -> bool:
    """Whether the densities of single tensors follow from the scan."""
    return config.prune.allocation in ("paper", "budget") or config.target.mode == "thresholds"


def costs(config: Config, weights: Mapping[str, int], flops: Mapping[str, int]) -> dict[str, Cost]:
    """What each tensor costs, in what target.budget counts, from its weights and its FLOPs when dense."""
    return {name: cost.price(config.target.budget, count, flops[name]) for name, count in weights.items()}


def require_possible(config: Config, weights: Mapping[str, int], flops: Mapping[str, int]) -> None:
    """Raise UserError, before any training, if a round's budget is below a weight or limits rule the last one out."""
    if config.target.mode == "no-loss":  # it stops where no more can go
        return
    prune, prices = config.prune, costs(config, weights, flops)
    least, most = limits.bounds(weights, weights, prune.min_weights, prune.floors, prune.ceilings)
    total = limits.spent(weights, prices)
    last = [budget(config, number, total) for number in range(1, len(densities(config)) + 1)][-1]
    if config.target.mode == "compression" and prune.allocation != "explicit":
        cheapest, dearest = limits.spent(least, prices), limits.spent(most, prices)
        unit = config.target.budget
        limits.require_possible(last, cheapest, dearest, prune.min_weights, len(weights), unit)


def scanned(config: Config, scan: Mapping[str, Any], classes: int, flops: Mapping[str, int]) -> Scanned:
    """What plans take from the content of scan.json; `classes` tells chance, `flops` are the tensors' when dense."""
    prices = costs(config, {tensor["name"]: int(tensor["weights"]) for tensor in scan["tensors"]}, flops)
    best = damage.best_together(scan)
    by_power = {
        power: {name: Priced(curve, prices[name]) for name, curve in damage.curves(scan, classes, power).items()}
        for power in {row["power"] for row in best.values()} or {damage.USUAL_POWER}
    }

    def held(row: Mapping[str, Any]) -> Held:
        unscaled = damage.total_rise(budgeting.predicted(by_power[row["power"]], row["keep"]), row["power"])
        return Held(row["power"], max(row["rise"], damage.FINEST) / max(unscaled, damage.FINEST))

    at = {density: held(row) for density, row in best.items() if math.isfinite(row["rise"])}
    qualities = {tensor["name"]: tensor["quality"] for tensor in scan["tensors"]}
    return Scanned(qualities, Composed(by_power, at or {1.0: budgeting.USUAL}))


def make(
    config: Config,
    goal: Goal,
    weights: dict[str, Tensor],
    dense_weights: dict[str, Tensor],
    alive: dict[str, Tensor],
    scan: Scanned | None,
    statistics: dict[str, Tensor] | None = None,
) -> RoundPlan:
    """Plan an attempt at a round from the weights as they are; equal inputs give equal plans on every rank.

    `alive` is True where a weight has survived the rounds before; `statistics` are what the criterion needs. Raises
    UserError for a budget that cannot be met.
    """
    ranking = criteria.scores(config.prune.criterion, weights, config.seed, statistics)
    sigmas = {name: sigma(dense_weights[name]) for name in weights}
    if config.prune.sigma == "renewed":
        sigmas = {name: sigma(weight[alive[name]]) for name, weight in weights.items()}
    prune, spend = config.prune, None
    if config.target.mode == "thresholds":
        # The paper gives no schedule of qualities over the rounds: round k of K uses k/K of each.
        share = goal.round / len(densities(config))
        scaled = {name: value * share for name, value in (scan.qualities if scan else {}).items()}
        keep = allocation.threshold_counts(
            ranking, alive, sigmas, scaled, prune.min_weights, prune.floors, prune.ceilings
        )
    else:
        spend = spendable(config, goal, alive, scan)
        keep = allocation.allocate(
            config.prune.allocation,
            ranking,
            alive,
            spend,
            sigmas=sigmas,
            qualities=scan.qualities if scan else None,
            densities=explicit_densities(config, goal.density) if prune.allocation == "explicit" else None,
            damages=scan.damages if scan else None,
            unit=config.target.budget,
            min_weights=prune.min_weights,
            floors=prune.floors,
            ceilings=prune.ceilings,
        )
    tensors = tuple(
        TensorPlan(
            name=name,
            weights=weight.numel(),
            keep=keep[name],
            dead=0,
            threshold=allocation.threshold(ranking[name], keep[name], alive[name]),
        )
        for name, weight in weights.items()
    )
    predicted = prediction(config, keep, alive, spend, scan)
    return RoundPlan(
        round=goal.round,
        attempt=goal.attempt,
        planned_density=goal.density,
        budget=sum(keep.values()),
        predicted=predicted,
        tensors=tensors,
    )


def spendable(config: Config, goal: Goal, alive: dict[str, Tensor], scan: Scanned | None) -> int:
    """The budget of an attempt, or what is left to spend it on.

    Dead units may leave less, and on the way to the last density so may ceilings.
    """
    solved = config.prune.allocation == "budget"
    prices = scan.prices if scan and solved else {}
    last = config.target.mode == "compression" and goal.density == densities(config)[-1]
    if config.prune.dead_neurons or not last:
        return min(goal.budget, limits.spent(bounds(config, alive)[1], prices))
    return goal.budget


def bounds(config: Config, alive: dict[str, Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most weights of each tensor, as the settings have them."""
    sizes = {name: mask.numel() for name, mask in alive.items()}
    living = {name: int(mask.sum()) for name, mask in alive.items()}
    return limits.bounds(sizes, living, config.prune.min_weights, config.prune.floors, config.prune.ceilings)


def prediction(
    config: Config, keep: dict[str, int], alive: dict[str, Tensor], spend: int | None, scan: Scanned | None
) -> Prediction | None:
    """What the scan lets expect of the counts before retraining; None without a scan."""
    if scan is None:
        return None
    spent = limits.spent(keep, scan.prices)
    money = spend if spend is not None and config.prune.allocation == "budget" else spent
    best = scan.damages.within(*bounds(config, alive))(money)
    return Prediction(
        unit=config.target.budget,
        budget=money,
        spent=spent,
        rise=best.held.rise(budgeting.predicted(scan.damages.by_power[best.held.power], keep)),
        least=best.least,
        power=best.held.power,
        scale=best.held.scale,
    )


def explicit_densities(config: Config, density: float) -> dict[str, float]:
    """The explicit densities as they stand when the whole is at `density`: all fall geometrically together."""
    final = densities(config)[-1]
    progress = math.log(density) / math.log(final) if final < 1.0 else 1.0
    return {name: value**progress for name, value in config.prune.densities.items()}
