"""What one round is to keep: exact counts, fixed before anything of it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pipeline.config import Config
from pipeline.models import Prunable
from pipeline.prune import allocation, criteria, schedules
from pipeline.prune.one_tensor import sigma


@dataclass(frozen=True)
class RoundPlan:
    """The counts of round `round` (from 1), and the score under which a tensor's weights go.

    `dead` counts what was taken off each tensor since it led to or from a dead unit; `keep` is what is left after it.
    """

    round: int
    density: float
    keep: dict[str, int]
    thresholds: dict[str, float]
    dead: dict[str, int] = field(default_factory=dict)

    def as_json(self, prunable: list[Prunable]) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "round": self.round,
            "attempt": 1,
            "planned_density": self.density,
            "budget": sum(self.keep.values()),
            "tensors": [
                {
                    "name": t.name,
                    "weights": t.weights,
                    "keep": self.keep[t.name],
                    "dead": self.dead.get(t.name, 0),
                    "threshold": self.thresholds[t.name],
                }
                for t in prunable
            ],
        }


def densities(config: Config) -> list[float]:
    """The density after each round."""
    return schedules.densities(config.prune, 1.0 / config.target.compression)


def budget(config: Config, number: int, total: int) -> int:
    """Weights to keep after round `number` (from 1), of `total` prunable ones."""
    compression = None if config.prune.schedule == "list" else config.target.compression
    return schedules.budgets(densities(config), total, compression)[number - 1]


def needs_scan(config: Config) -> bool:
    """Whether the densities of single tensors follow from the scan."""
    return config.prune.allocation == "paper" or config.target.mode == "thresholds"


def make(
    config: Config,
    number: int,
    weights: dict[str, Tensor],
    dense_weights: dict[str, Tensor],
    alive: dict[str, Tensor],
    qualities: dict[str, float] | None,
    statistics: dict[str, Tensor] | None = None,
) -> RoundPlan:
    """Plan round `number` from the weights as they are; equal inputs give equal plans on every rank.

    `alive` is True where a weight has survived the rounds before; `statistics` are what the criterion needs. Raises
    UserError for a budget that cannot be met.
    """
    density = densities(config)[number - 1]
    ranking = criteria.scores(config.prune.criterion, weights, config.seed, statistics)
    sigmas = {name: sigma(dense_weights[name]) for name in weights}
    if config.prune.sigma == "renewed":
        sigmas = {name: sigma(weight[alive[name]]) for name, weight in weights.items()}
    if config.target.mode == "thresholds":
        # The paper gives no schedule of qualities over the rounds: round k of K uses k/K of each.
        share = number / len(densities(config))
        scaled = {name: value * share for name, value in (qualities or {}).items()}
        keep = allocation.threshold_counts(ranking, alive, sigmas, scaled, config.prune.min_weights)
    else:
        wanted = budget(config, number, sum(weight.numel() for weight in weights.values()))
        if config.prune.dead_neurons:  # dead units of the rounds before may have left fewer than this one's budget
            wanted = min(wanted, sum(int(mask.sum()) for mask in alive.values()))
        keep = allocation.allocate(
            config.prune.allocation,
            ranking,
            alive,
            wanted,
            sigmas=sigmas,
            qualities=qualities,
            densities=explicit_densities(config, density),
            min_weights=config.prune.min_weights,
        )
    thresholds = {name: allocation.threshold(ranking[name], keep[name], alive[name]) for name in weights}
    return RoundPlan(number, density, keep, thresholds)


def explicit_densities(config: Config, density: float) -> dict[str, float]:
    """The explicit densities as they stand when the whole is at `density`: all fall geometrically together."""
    final = densities(config)[-1]
    progress = math.log(density) / math.log(final) if final < 1.0 else 1.0
    return {name: value**progress for name, value in config.prune.densities.items()}
