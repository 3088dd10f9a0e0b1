"""Allocations: how one budget of weights is shared out, as the exact number of weights that each tensor keeps.

To add one, write a function from Request to counts and put it into ALLOCATIONS with its traits. Tensors are
dictionaries by name, in definition order. Of equal scores, the one in the earlier tensor is kept first; within a
tensor, the one with the lower flat index.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.network.cost import Quantity
from pipeline.prune.budget import Composed
from pipeline.prune.limits import by_name, nearest, require_possible, spent
from pipeline.prune.masks import as_array, as_bool, kth_largest
from pipeline.settings.pruning import Prune


@dataclass(frozen=True)
class Request:
    """What an allocation is given. Every dictionary has the tensors' names for keys.

    scores: higher keeps; alive: bool, False was pruned before and stays pruned; budget: what the tensors may cost
    together, in `unit`; floors and caps: the fewest and most weights of each tensor (`limits.bounds`); sigmas,
    qualities: the paper's, or None; densities: explicit, by name or pattern; damages: predicted damage and cost of the
    tensors, or None.
    """

    scores: dict[str, Tensor]
    alive: dict[str, Tensor]
    budget: int
    floors: dict[str, int]
    caps: dict[str, int]
    sigmas: dict[str, float] | None = None
    qualities: dict[str, float] | None = None
    densities: dict[str, float] | None = None
    damages: Composed | None = None
    unit: Quantity = "weights"


@dataclass(frozen=True)
class Allocation:
    """A way to share a budget out among the tensors, and what others ask of it.

    counts(request): the weights that each tensor keeps, within its bounds.
    uses_scores: the counts follow from scores, and so from trained weights.
    needs_scan: the counts follow from the scan of each tensor alone.
    needs_together: the counts also follow from the scan of all tensors pruned together.
    spends_costs: the budget pays for the tensors' costs. It may be in other units than weights, and need not be met
    exactly.
    fixes_densities: the densities are those of prune.densities, and the budget is not used.
    shares_channels: it can share out the channels of groups as it shares out the weights of tensors.
    """

    counts: Callable[[Request], dict[str, int]]
    uses_scores: bool = False
    needs_scan: bool = False
    needs_together: bool = False
    spends_costs: bool = False
    fixes_densities: bool = False
    shares_channels: bool = False


def paper(request: Request) -> dict[str, int]:
    """One threshold for |w| / (q_i * sigma_i) over all tensors, solved for the budget.

    A threshold of 1 gives the paper's own thresholds, quality times standard deviation (section 3). A tensor whose
    weights are all equal (sigma 0) has threshold 0: its non-zero weights are kept. Without qualities all q_i are 1.
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
    named = by_name(request.densities, request.scores, "prune.densities")
    return {
        name: min(max(nearest(named.get(name, 1.0), score.numel()), request.floors[name]), request.caps[name])
        for name, score in request.scores.items()
    }


def budgeted(request: Request) -> dict[str, int]:
    """The least predicted damage under the budget. The budget is in the unit of `request.unit`; see
    pipeline.prune.budget.
    """
    assert request.damages is not None, "allocation 'budget' needs the damage that the scan predicts"
    return request.damages.within(request.floors, request.caps)(request.budget).keep


ALLOCATIONS: dict[str, Allocation] = {
    "paper": Allocation(paper, uses_scores=True, needs_scan=True),
    "pooled": Allocation(pooled, uses_scores=True, shares_channels=True),
    "uniform": Allocation(uniform, shares_channels=True),
    "erk": Allocation(erk),
    "explicit": Allocation(explicit, fixes_densities=True, shares_channels=True),
    "budget": Allocation(budgeted, needs_scan=True, needs_together=True, spends_costs=True, shares_channels=True),
}


def of(prune: Prune) -> Allocation:
    """The allocation that the settings name. Raises UserError for an unknown one."""
    return lookup(ALLOCATIONS, prune.allocation, "prune.allocation")


def allocate(name: str, request: Request, min_weights: int = 1) -> dict[str, int]:
    """The number of weights each tensor keeps. The numbers add up to the request's budget exactly, with two exceptions.

    An allocation that fixes densities has no budget. One that spends costs may stay below its budget. Each tensor keeps
    to its floor and cap. `min_weights` is the setting that the floors came from; error messages name it. Raises
    UserError for an unknown allocation, a budget that the bounds rule out, or a score that is NaN.
    """
    chosen = lookup(ALLOCATIONS, name, "prune.allocation")
    scores, least, most = request.scores, request.floors, request.caps
    assert scores
    assert scores.keys() == request.alive.keys()
    for tensor, score in scores.items():
        # A sum is NaN if one term is, or if +inf meets -inf; it needs no second tensor of the same size.
        if torch.isnan(score.sum()) and bool(torch.isnan(score).any()):
            raise UserError(f"{tensor}: its scores are not numbers (NaN); the weights of the checkpoint are not finite")
    if not chosen.fixes_densities:
        costs = request.damages.prices if chosen.spends_costs and request.damages else {}
        cheapest, dearest = spent(least, costs), spent(most, costs)
        require_possible(request.budget, cheapest, dearest, min_weights, len(scores), request.unit)
    counts = chosen.counts(request)
    assert all(least[tensor] <= counts[tensor] <= most[tensor] for tensor in scores)
    assert chosen.fixes_densities or chosen.spends_costs or sum(counts.values()) == request.budget
    return {tensor: counts[tensor] for tensor in scores}


def threshold_counts(request: Request) -> dict[str, int]:
    """The paper's thresholds as they are (section 3): each tensor keeps its alive scores >= q_i * sigma_i.

    The budget is not used. Each tensor keeps to its floor and cap.
    """
    assert request.sigmas is not None, "thresholds need the tensors' standard deviations"
    assert request.qualities is not None, "thresholds need the qualities of a scan"
    counts = {}
    for name, score in request.scores.items():
        limit = request.qualities[name] * request.sigmas[name]
        above = int(torch.count_nonzero((score >= limit) & request.alive[name]))
        counts[name] = min(max(above, request.floors[name]), request.caps[name])
    return counts


def threshold(scores: Tensor, keep: int, alive: Tensor) -> float:
    """The smallest score kept when the `keep` highest alive scores are kept; no pruned weight scores above it.

    With keep=0, the next number above the highest score.
    """
    values = as_array(scores)[as_bool(alive)]
    assert 0 <= keep <= values.size
    if keep == 0:
        return float(np.nextafter(values.max(), np.inf, dtype=values.dtype)) if values.size else 0.0
    return kth_largest(values, keep)


def proportional(shares: dict[str, int], floors: dict[str, int], caps: dict[str, int], budget: int) -> dict[str, int]:
    """Whole numbers proportional to `shares`, within floors and caps, that add up to `budget`.

    The real solution is clip(level * share, floor, cap) for the one level that adds up. It is rounded down. The missing
    units go to the largest remainders; of equal remainders, to the earlier tensor. Needs sum(floors) <= budget <=
    sum(caps).
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
    """How many weights of each tensor are above one threshold for score / scale, within floors and caps.

    A threshold can leave some tensors below their floors and others above their caps. The group that misses by more
    weights in total is fixed at its bounds, and the rest is solved again. The other group may then come out right.
    """
    values = {name: _scaled(request.scores[name], request.alive[name], scales[name]) for name in request.scores}
    wide = np.result_type(*values.values())  # one dtype, so that the threshold compares exactly everywhere
    values = {name: array.astype(wide, copy=False) for name, array in values.items()}
    fixed: dict[str, int] = {}
    while True:
        free = {name: array for name, array in values.items() if name not in fixed}
        counts = _above(free, request.budget - sum(fixed.values()))
        short = {name: request.floors[name] for name in free if counts[name] < request.floors[name]}
        long = {name: request.caps[name] for name in free if counts[name] > request.caps[name]}
        if not short and not long:
            return fixed | counts
        missing = sum(floor - counts[name] for name, floor in short.items())
        over = sum(counts[name] - cap for name, cap in long.items())
        fixed |= (short if missing >= over else {}) | (long if over >= missing else {})


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
    """The alive scores divided by the scale, as a new array. With scale 0, scores above 0 become infinite."""
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


def sigma(weight: Tensor) -> float:
    """The standard deviation of a tensor's weights, over all of them (population form); 0 of none."""
    if not weight.numel():
        return 0.0
    return float(weight.detach().double().std(correction=0))
