"""Allocations: one budget of weights to the exact number that each tensor keeps.

To add one, write a function from Request to counts and put it into ALLOCATIONS. Tensors are dictionaries by name in
definition order, which also breaks ties: of equal scores the tensor named first keeps, then the lower flat index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UserError
from pipeline.names import hint, lookup
from pipeline.prune.masks import as_array, as_bool, kth_largest


@dataclass(frozen=True)
class Request:
    """What an allocation is given. Every dictionary has the tensors' names for keys.

    scores: higher keeps; alive: bool, False was pruned before and stays pruned; floors and caps: the fewest and most
    weights of each tensor; sigmas, qualities: the paper's, or None; densities: explicit, by name or pattern.
    """

    scores: dict[str, Tensor]
    alive: dict[str, Tensor]
    budget: int
    floors: dict[str, int]
    caps: dict[str, int]
    sigmas: dict[str, float] | None
    qualities: dict[str, float] | None
    densities: dict[str, float] | None


def paper(request: Request) -> dict[str, int]:
    """One threshold for |w| / (q_i * sigma_i) over all tensors, solved for the budget.

    A threshold of 1 gives the paper's own thresholds, quality times standard deviation (section 3). A tensor whose
    weights are all alike (sigma 0) has threshold 0: what is not 0 in it is kept. Without qualities all q_i are 1.
    """
    assert request.sigmas is not None, "allocation 'paper' needs the tensors' standard deviations"
    return _pool(request, _scales(request.scores, request.sigmas, request.qualities))


def pooled(request: Request) -> dict[str, int]:
    """One threshold for the scores as they are, over all tensors ("global" elsewhere)."""
    return _pool(request, dict.fromkeys(request.scores, 1.0))


def uniform(request: Request) -> dict[str, int]:
    """The same density in every tensor, as nearly as whole weights allow."""
    return proportional({n: s.numel() for n, s in request.scores.items()}, request.floors, request.caps, request.budget)


def erk(request: Request) -> dict[str, int]:
    """Erdos-Renyi-Kernel (Evci et al. 2020, RigL): density proportional to sum(shape) / prod(shape).

    Kept counts are then proportional to the sum of the dimensions, kernel dimensions included; tensors that would
    keep more than they have keep all, and the rest is solved again.
    """
    return proportional(
        {name: sum(score.shape) for name, score in request.scores.items()}, request.floors, request.caps, request.budget
    )


def explicit(request: Request) -> dict[str, int]:
    """The densities of prune.densities; the budget is not used and tensors that nothing names stay as they are.

    A tensor's own name goes before patterns, the first pattern before later ones. Raises UserError for a pattern that
    matches no tensor.
    """
    assert request.densities is not None, "allocation 'explicit' needs densities"
    for pattern in request.densities:
        if not any(fnmatchcase(name, pattern) for name in request.scores):
            raise UserError(f"prune.densities: '{pattern}' matches no prunable tensor; {hint(pattern, request.scores)}")
    counts = {}
    for name, score in request.scores.items():
        named = [density for pattern, density in request.densities.items() if fnmatchcase(name, pattern)]
        density = request.densities.get(name, named[0] if named else 1.0)
        wanted = math.floor(density * score.numel() + 0.5)
        counts[name] = min(max(wanted, request.floors[name]), request.caps[name])
    return counts


ALLOCATIONS: dict[str, Callable[[Request], dict[str, int]]] = {
    "paper": paper,
    "pooled": pooled,
    "uniform": uniform,
    "erk": erk,
    "explicit": explicit,
}


def allocate(
    name: str,
    scores: dict[str, Tensor],
    alive: dict[str, Tensor],
    budget: int,
    *,
    sigmas: dict[str, float] | None = None,
    qualities: dict[str, float] | None = None,
    densities: dict[str, float] | None = None,
    min_weights: int = 1,
) -> dict[str, int]:
    """The number of weights each tensor keeps; they add up to `budget` exactly (but for `explicit`).

    No tensor keeps more than it has alive, nor fewer than min(min_weights, alive). Raises UserError for an unknown
    allocation, a budget that these bounds rule out, or a score that is NaN.
    """
    function = lookup(ALLOCATIONS, name, "prune.allocation")
    assert scores
    assert scores.keys() == alive.keys()
    for tensor, score in scores.items():
        # A sum is NaN if one term is, or if +inf meets -inf; it needs no second tensor of the same size.
        if torch.isnan(score.sum()) and bool(torch.isnan(score).any()):
            raise UserError(f"{tensor}: its scores are not numbers (NaN); the weights of the checkpoint are not finite")
    caps = {tensor: int(torch.count_nonzero(mask)) for tensor, mask in alive.items()}
    floors = {tensor: min(min_weights, cap) for tensor, cap in caps.items()}
    if name != "explicit":
        _require_possible(budget, floors, caps, min_weights)
    counts = function(Request(scores, alive, budget, floors, caps, sigmas, qualities, densities))
    assert all(floors[tensor] <= counts[tensor] <= caps[tensor] for tensor in scores)
    assert name == "explicit" or sum(counts.values()) == budget
    return {tensor: counts[tensor] for tensor in scores}


def threshold_counts(
    scores: dict[str, Tensor],
    alive: dict[str, Tensor],
    sigmas: dict[str, float],
    qualities: dict[str, float],
    min_weights: int = 1,
) -> dict[str, int]:
    """The paper's thresholds as they are (section 3): each tensor keeps its alive scores >= q_i * sigma_i.

    A tensor keeps at least min(min_weights, alive).
    """
    counts = {}
    for name, score in scores.items():
        cap = int(torch.count_nonzero(alive[name]))
        above = int(torch.count_nonzero((score >= qualities[name] * sigmas[name]) & alive[name]))
        counts[name] = max(above, min(min_weights, cap))
    return counts


def threshold(scores: Tensor, keep: int, alive: Tensor) -> float:
    """The smallest score kept when the `keep` highest of the alive ones are; no pruned one is above it.

    With keep=0, the next number above the highest score.
    """
    values = as_array(scores)[as_bool(alive)]
    assert 0 <= keep <= values.size
    if keep == 0:
        return float(np.nextafter(values.max(), np.inf, dtype=values.dtype)) if values.size else 0.0
    return kth_largest(values, keep)


def proportional(shares: dict[str, int], floors: dict[str, int], caps: dict[str, int], budget: int) -> dict[str, int]:
    """Whole numbers proportional to `shares`, within floors and caps, that add up to `budget`.

    The real solution is clip(level * share, floor, cap) for the one level that adds up; it is rounded down and what is
    missing goes to the largest remainders, to the earlier tensor where these are equal. Needs
    sum(floors) <= budget <= sum(caps).
    """
    assert sum(floors.values()) <= budget <= sum(caps.values())
    active = [name for name, share in shares.items() if share > 0]

    def clipped(name: str, level: Fraction) -> Fraction:
        return min(max(level * shares[name], Fraction(floors[name])), Fraction(caps[name]))

    # The sum is piecewise linear in the level and bends where a tensor leaves its floor or meets its cap: find the
    # last bend at or below the budget (by bisection, exactly), and go on from it along the straight piece.
    bends = sorted({Fraction(bound[name], shares[name]) for name in active for bound in (floors, caps)} | {Fraction(0)})
    low, high = 0, len(bends) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if sum(clipped(name, bends[middle]) for name in active) <= budget:
            low = middle
        else:
            high = middle - 1
    level = bends[low]
    rising = sum(shares[n] for n in active if floors[n] <= level * shares[n] < caps[n])
    if rising:
        level += (budget - sum((clipped(name, level) for name in active), Fraction(0))) / rising
    exact = {name: clipped(name, level) for name in active}
    counts = {name: math.floor(exact.get(name, Fraction(0))) for name in shares}
    by_remainder = sorted(active, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts


def _pool(request: Request, scales: dict[str, float]) -> dict[str, int]:
    """The counts above one threshold for score / scale; tensors that fall below their floor are fixed at it."""
    values = {name: _scaled(request.scores[name], request.alive[name], scales[name]) for name in request.scores}
    wide = np.result_type(*values.values())  # one dtype, so that the threshold compares exactly everywhere
    values = {name: array.astype(wide, copy=False) for name, array in values.items()}
    fixed: dict[str, int] = {}
    while True:
        free = {name: array for name, array in values.items() if name not in fixed}
        counts = _above(free, request.budget - sum(fixed.values()))
        short = {name: request.floors[name] for name in free if counts[name] < request.floors[name]}
        if not short:
            return fixed | counts
        fixed |= short  # their floors cost the others part of the budget, so these are solved again


def _above(values: dict[str, NDArray[np.floating]], budget: int) -> dict[str, int]:
    """How many of the `budget` highest values lie in each array, ties going to the earlier arrays."""
    assert 0 <= budget <= sum(array.size for array in values.values())
    if budget == 0:
        return dict.fromkeys(values, 0)
    limit = kth_largest(np.concatenate([*values.values()]), budget)
    counts = {name: int(np.count_nonzero(array > limit)) for name, array in values.items()}
    left = budget - sum(counts.values())
    for name, array in values.items():
        taken = min(left, int(np.count_nonzero(array == limit)))
        counts[name] += taken
        left -= taken
    assert left == 0
    return counts


def _scaled(score: Tensor, alive: Tensor, scale: float) -> NDArray[np.floating]:
    """The alive scores over the scale, as a new array; over a scale of 0, what is above 0 is infinite."""
    values = as_array(score)[as_bool(alive)]
    if scale == 0.0:
        return np.where(values > 0, np.inf, 0.0).astype(values.dtype)
    if scale != 1.0:
        values /= values.dtype.type(scale)
    return values


def _scales(
    scores: dict[str, Tensor], sigmas: dict[str, float], qualities: dict[str, float] | None
) -> dict[str, float]:
    scales = {name: sigmas[name] * (1.0 if qualities is None else qualities[name]) for name in scores}
    assert all(scale >= 0 and math.isfinite(scale) for scale in scales.values()), scales
    return scales


def _require_possible(budget: int, floors: dict[str, int], caps: dict[str, int], min_weights: int) -> None:
    floor, cap = sum(floors.values()), sum(caps.values())
    if budget < floor:
        raise UserError(
            f"the budget of {budget:,} weights (target.compression or prune.list) is below the {floor:,} that "
            f"prune.min_weights={min_weights} keeps in {len(floors)} tensors; lower target.compression or "
            "prune.min_weights"
        )
    if budget > cap:
        raise UserError(
            f"the budget of {budget:,} weights (target.compression or prune.list) is above the {cap:,} that are not "
            "pruned yet, and a round brings none back; raise target.compression or start from an earlier round"
        )
