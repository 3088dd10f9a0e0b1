"""Whole channels: how many units of each group a budget keeps, and which.

Allocations share out units as they share out weights: a group of channels (`pipeline.network.groups`) stands where a
tensor stands otherwise, and a unit where a weight does. What the tensors then cost follows from the counts of all
groups together, since a weight stays where both of its channels stay. The plan is the largest share of units whose cost
is within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.network.groups import Flags, Groups
from pipeline.prune import allocation, limits
from pipeline.prune.allocation import Request
from pipeline.prune.budget import Cost
from pipeline.prune.masks import top_mask
from pipeline.settings.pruning import Prune


def scores(groups: Groups, ranking: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The score of each unit of each group, (units,) float64: the mean of the scores of its weights in each tensor.

    Each tensor's scores are divided by their mean first, so that tensors and groups of different sizes and scales count
    alike.
    """
    means = {name: float(score.double().mean()) or 1.0 for name, score in ranking.items()}
    found = {}
    for name, group in groups.by_name.items():
        total = torch.zeros(group.units, dtype=torch.float64)
        for member in group.members:
            score = ranking[member.tensor].detach().double().cpu()
            lines = score.mean(dim=[axis for axis in range(score.ndim) if axis != member.axis])
            total += lines[torch.from_numpy(member.places)].mean(1) / means[member.tensor]
        found[name] = total / len(group.members)
    return found


def bounds(prune: Prune, alive: Mapping[str, Flags]) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most units of each group, as the settings have them; each group keeps one at the least."""
    units = {name: len(flags) for name, flags in alive.items()}
    living = {name: int(flags.sum()) for name, flags in alive.items()}
    return limits.bounds(units, living, max(1, prune.min_weights), prune.floors, prune.ceilings)


def plan(
    prune: Prune, groups: Groups, units: Mapping[str, Tensor], alive: Mapping[str, Flags], budget: int,
    prices: Mapping[str, Cost], densities: dict[str, float] | None,
) -> dict[str, int]:  # fmt: skip
    """How many units each group keeps, so that all tensors cost `budget` at most, by no more than one unit less.

    `units` are the units' scores. `densities` are those of `explicit`, by group, which uses no budget. Raises UserError
    where even the fewest units cost more.
    """
    least, most = bounds(prune, alive)
    flags = {name: torch.from_numpy(each) for name, each in alive.items()}

    def shared(number: int) -> dict[str, int]:
        request = Request(dict(units), flags, number, least, most, densities=densities)
        return allocation.allocate(prune.allocation, request, prune.min_weights)

    if allocation.of(prune).fixes_densities:
        return shared(0)
    require_possible(groups, least, budget, prices, prune.pattern)
    low, high = sum(least.values()), sum(most.values())
    return shared(_largest(low, high, lambda number: cost(groups, shared(number), prices) <= budget))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from low to high that fits, where low does and all below one that fits do."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def cost(groups: Groups, keep: Mapping[str, int], prices: Mapping[str, Cost]) -> int:
    """What all prunable tensors cost where so many units of each group stay."""
    return limits.spent(groups.counts(keep), prices)


def require_possible(
    groups: Groups, least: Mapping[str, int], budget: int, prices: Mapping[str, Cost], pattern: str
) -> None:
    """Raise UserError where there are no groups, or where their fewest units cost more than the budget."""
    if not groups.by_name:
        raise UserError(
            f"prune.pattern={pattern}: no channel of this network can be removed: {'; '.join(groups.notes[:3])}"
            if groups.notes
            else f"prune.pattern={pattern}: no channel of this network can be removed: all are inputs or outputs"
        )
    cheapest = cost(groups, least, prices)
    if cheapest > budget:
        raise UserError(
            f"prune.pattern={pattern}: the fewest channels cost {cheapest:,}, more than the budget of {budget:,} "
            "(target.compression or prune.list): lower target.compression, prune.min_weights or prune.floors. What is "
            "in no group of channels stays whole; `secateur plan` lists the groups"
        )


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
