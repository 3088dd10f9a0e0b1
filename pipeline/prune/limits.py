"""Limits of single tensors, and the cost of keeping so many weights of each.

Floors and ceilings are densities by a tensor's name or pattern, for every allocation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline.base.errors import UserError
from pipeline.base.names import hint
from pipeline.network.cost import Quantity
from pipeline.prune.budget import Cost


def by_name(patterns: Mapping[str, float], names: Mapping[str, object], setting: str) -> dict[str, float]:
    """The value that a setting {name or pattern: value} has for each tensor that it names.

    A tensor's own name goes before patterns, the first pattern before later ones. Raises UserError for a pattern that
    matches no tensor.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{setting}: '{pattern}' matches no prunable tensor; {hint(pattern, names)}")
    found = {}
    for name in names:
        matching = [value for pattern, value in patterns.items() if fnmatchcase(name, pattern)]
        if matching:
            found[name] = patterns.get(name, matching[0])
    return found


def nearest(density: float, weights: int) -> int:
    """The whole number of weights nearest to a density, the larger of two."""
    return math.floor(density * weights + 0.5)


def bounds(
    weights: Mapping[str, int],
    alive: Mapping[str, int],
    min_weights: int,
    floors: Mapping[str, float],
    ceilings: Mapping[str, float],
) -> tuple[dict[str, int], dict[str, int]]:
    """The fewest and the most weights that each tensor keeps: (floors, caps).

    `floors` and `ceilings` are densities by name or pattern; equal ones fix a tensor. min_weights overrides a ceiling,
    and no bound is above the number of alive weights. Raises UserError for a pattern that matches no tensor, and for a
    floor above a ceiling.
    """
    lowest, highest = by_name(floors, weights, "prune.floors"), by_name(ceilings, weights, "prune.ceilings")
    least, most = {}, {}
    for name, count in weights.items():
        low, high = lowest.get(name, 0.0), highest.get(name, 1.0)
        if low > high:
            raise UserError(
                f"prune.floors gives {name} at least {low:g} of its weights and prune.ceilings at most {high:g}: lower "
                "the floor or raise the ceiling; equal ones fix a tensor"
            )
        least[name] = min(max(nearest(low, count), min_weights), alive[name])
        most[name] = max(min(nearest(high, count), alive[name]), least[name])
    return least, most


def spent(counts: Mapping[str, int], costs: Mapping[str, Cost]) -> int:
    """What so many weights of each tensor cost; a tensor without a cost costs its weights."""
    return sum(costs[name](count) if name in costs else count for name, count in counts.items())


def require_possible(
    budget: int, floor: int, cap: int, min_weights: int, tensors: int, unit: Quantity = "weights"
) -> None:
    """Raise UserError where a budget is below the cost of the floors or above the cost of the caps."""
    if budget < floor:
        raise UserError(
            f"the budget of {budget:,} {unit} (target.compression or prune.list) is below the {floor:,} that "
            f"prune.min_weights={min_weights} and prune.floors keep in {tensors} tensors; lower target.compression, "
            "prune.min_weights or prune.floors"
        )
    if budget > cap:
        raise UserError(
            f"the budget of {budget:,} {unit} (target.compression or prune.list) is above the {cap:,} that are not "
            "pruned yet and within prune.ceilings and prune.pattern, and a round brings none back; raise "
            "target.compression or prune.ceilings, or start from an earlier round"
        )
