"""Which round comes next, worked out from the rounds that a run has tried.

With a schedule all rounds are fixed beforehand. With target.mode=no-loss each round depends on the rounds before it.
A round keeps the share target.step of the weights that are left, and is compared with the dense network on val. If it
lost too much accuracy, it is undone, and half the step (in the logarithm of the density) is tried from the previous
round.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from pipeline.base import stats
from pipeline.base.errors import UserError
from pipeline.prune import round_plan, schedules
from pipeline.prune.round_plan import Goal
from pipeline.run.records import Judgement
from pipeline.settings.pruning import Prune, Target


@dataclass(frozen=True)
class Origin:
    """Where the first round begins: `kept` of `total` prunable weights, `generation` rounds after the dense network."""

    kept: int
    total: int
    generation: int = 0

    @property
    def density(self) -> float:
        """Kept over prunable weights."""
        return self.kept / self.total


@dataclass(frozen=True)
class Tried:
    """A finished attempt: the density it was planned for, and the weights that it kept in the end."""

    planned_density: float
    kept: int
    accepted: bool


def following(prune: Prune, target: Target, origin: Origin, floor: int, tried: Sequence[Tried]) -> Goal | None:
    """The attempt that follows those in `tried`, which are in order; None when the run is done.

    `floor` is the fewest weights that prune.min_weights allows. Raises UserError for a budget that cannot be met.
    """
    if target.no_loss:
        return _no_loss(target, origin, floor, tried)
    planned = round_plan.densities(prune, target, origin.density)
    number = len(tried) + 1
    if number > len(planned):
        return None
    budget = round_plan.budget(prune, target, number, origin.total, origin.density)
    return Goal(number, 1, planned[number - 1], budget, origin.generation + number)


def outlook(prune: Prune, target: Target, origin: Origin, floor: int) -> list[Goal]:
    """All rounds of a run if each of them is accepted. Raises UserError for a budget that cannot be met."""
    goals: list[Goal] = []
    tried: list[Tried] = []
    while (goal := following(prune, target, origin, floor, tried)) is not None:
        goals.append(goal)
        tried.append(Tried(goal.density, goal.budget, accepted=True))
    return goals


def require_room(prune: Prune, target: Target, origin: Origin, floor: int, source: str | None) -> None:
    """Raise UserError if a run that begins at `source`, a pruned network, does not ask for fewer weights."""
    goals = outlook(prune, target, origin, floor)
    if source is None or origin.kept == origin.total or target.by_thresholds:
        return
    if not goals or goals[0].budget >= origin.kept:
        asked = f"prune.list={[*prune.list]}"
        if not schedules.of(prune).from_list:
            asked = f"target.compression={target.compression or origin.total:g}"
        raise UserError(
            f"{asked} removes nothing: start.from={source} has {origin.kept:,} of {origin.total:,} "
            f"weights left already (density {origin.density:.4g}, compression {origin.total / origin.kept:.4g}), and "
            "densities count from the dense network; ask for fewer weights, or start from an earlier round"
        )


def _no_loss(target: Target, origin: Origin, floor: int, tried: Sequence[Tried]) -> Goal | None:
    """The next attempt of a campaign, or None where its step is too small, its rounds are over or nothing is left."""
    kept, number, attempt, step = origin.kept, 1, 1, target.step
    for each in tried:
        if each.accepted:
            kept, number, attempt = each.kept, number + 1, 1
        else:
            step, attempt = math.sqrt(each.planned_density / (kept / origin.total)), attempt + 1
    if number > target.max_rounds or step > target.smallest_step:
        return None
    density = step * (kept / origin.total)
    budget = schedules.at_most(density, origin.total)
    if target.compression is not None and density <= 1.0 / target.compression:
        density, budget = 1.0 / target.compression, schedules.compressed(origin.total, target.compression)
    if budget < floor:
        density, budget = floor / origin.total, floor
    if budget >= kept:
        return None
    return Goal(number, attempt, density, budget, origin.generation + number)


def judge(dense_right: NDArray[np.bool_], pruned_right: NDArray[np.bool_], target: Target) -> Judgement:
    """Compare a round's answers with the dense network's on the same images; both arrays have shape (samples,).

    A round is accepted where `drop_high`, the upper end of the drop's one-sided interval (Tango's, at
    target.confidence), is within the tolerance.
    By the measured drop alone, a network whose true drop equals the tolerance would be accepted every second time.
    A campaign makes many tries, so it would collect lucky ones. By the interval, the chance is at most 1 - confidence,
    whatever the size of val; a small val ends the campaign earlier instead. If val is large, a drop that is certain but
    within the tolerance is accepted, as in the verdict on test.
    """
    compared = stats.mcnemar(dense_right, pruned_right)
    lost, won, samples = compared.only_reference_right, compared.only_pruned_right, len(dense_right)
    high = compared.drop
    if target.confidence > 0.5:  # at 0.5 the interval's end is the measured drop itself
        high = stats.tango(lost, won, samples, float(ndtri(target.confidence)))[1]
    return Judgement(compared.drop, high, lost, won, samples)


def accepts(found: Judgement, target: Target) -> bool:
    """Whether a round with this judgement is accepted."""
    return found.drop_high <= target.allowed


def require_enough(samples: int, target: Target) -> None:
    """Raise UserError where val is so small that not even a network with the dense one's answers would be accepted.

    Warns where it is so small that a network which is as good as the dense one would hardly be: one that loses and
    wins as many samples as the tolerance allows to be lost.
    """
    same = np.ones(samples, dtype=np.bool_)
    best = judge(same, same, target)
    if not accepts(best, target):
        raise UserError(
            f"target.mode=no-loss: with {samples:,} val images even a network that answers as the dense one does may "
            f"have lost {100 * best.drop_high:.2g} points (target.confidence={target.confidence:g}), more than the "
            f"{100 * target.allowed:.2g} of target.tolerance (by default target.margin): raise target.tolerance or "
            "data.val_fraction, or lower target.confidence (0.5 takes the measured drop as it is)"
        )
    changed = round(target.allowed * samples)
    if target.confidence > 0.5 and changed:
        dense, pruned = same.copy(), same.copy()
        dense[:changed], pruned[changed : 2 * changed] = False, False
        high = judge(dense, pruned, target).drop_high
        if high > target.allowed:
            warnings.warn(
                f"target.mode=no-loss: val has {samples:,} images. A network as good as the dense one that answers "
                f"{changed} of them better and {changed} worse may by them have lost {100 * high:.2g} points, more "
                f"than the {100 * target.allowed:.2g} of target.tolerance, so the campaign may end early: more val "
                "images (data.val_fraction) or a larger target.tolerance let it go on",
                stacklevel=2,
            )
