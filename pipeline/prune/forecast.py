"""The predicted rise of the loss for any budget, from the compressions at which all tensors were pruned together.

Each measurement says how damages add up near its own density (`pipeline.prune.budget.Held`). Between two of them the
prediction goes over from the one to the other, in the logarithms of budget and rise, so it is continuous. It never
falls as the budget shrinks. Its interval grows with the distance from the measurements, by the error that is made when
one of them is predicted from its neighbours: the median of these errors, or that of the nearest one where it is larger.
It is never narrower than what is not known of the measurements themselves. So near the dense network, where a rise
cannot be told from none, it reaches below zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.base.stats import Z95

Floats = NDArray[np.float64]

GRID = 400  # budgets that the prediction is worked out for; it is linear between them
ASSUMED = math.log(2)  # standard error of the logarithm of a rise, where nothing was measured together
LEAST = 1e-9  # nats; stands for no rise in logarithms


class Course(NamedTuple):
    """The allocations of least damage from the floors to the caps: arrays of cost, weights kept and rise (nats)."""

    cost: Floats
    kept: Floats
    rise: Floats


class Measured(NamedTuple):
    """A measurement of all tensors pruned together.

    `density` is that of all weights, `error` the standard error of the logarithm of its rise, and `course` the rises
    that follow from it for other budgets. `below` and `above` are how far (nats) the ends of the rise's interval lie
    from it.
    """

    density: float
    error: float
    course: Course
    below: float = 0.0
    above: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """The predicted rise (nats) at rising budgets, its relative standard error, and how far (nats) its interval reaches
    at least below and above it: arrays of shape (points,).
    """

    budgets: Floats
    rises: Floats
    errors: Floats
    below: Floats
    above: Floats

    def at(self, budget: float) -> tuple[float, float, float]:
        """The predicted rise (nats) for a budget, and the ends of its 95% interval; the lower may be below zero."""
        courses = (self.rises, self.errors, self.below, self.above)
        rise, error, below, above = (float(np.interp(budget, self.budgets, each)) for each in courses)
        factor = math.exp(Z95 * error)
        return rise, min(rise / factor, rise - below), max(rise * factor, rise + above)


def forecast(measured: Sequence[Measured], weights: int) -> Forecast:
    """The forecast from at least one measurement; `weights` is the number of all prunable weights."""
    known = sorted(measured, key=lambda each: each.density)
    places = [_place(each, weights) for each in known]
    low = max(1.0, min(each.course.cost[0] for each in known))
    high = max(low, *(each.course.cost[-1] for each in known))
    budgets = np.unique(np.concatenate([np.geomspace(low, high, GRID), np.clip(places, low, high)]))
    rises = _between(known, places, budgets)
    rises = np.maximum.accumulate(rises[::-1])[::-1]  # from the largest budget down
    at, x = np.log(budgets), np.log(np.maximum(places, 1.0))
    below, above = (np.interp(at, x, ends) for ends in ([e.below for e in known], [e.above for e in known]))
    missed = _missed(known, places, weights)
    return Forecast(budgets, rises, _errors(known, places, budgets, missed), below, above)


def _place(measured: Measured, weights: int) -> float:
    """The budget at which the course of a measurement has the density that was measured.

    One that is beyond the course, since fewer weights are alive or a pattern keeps fewer, keeps its distance from those
    within: were all of them put at the end, the farthest would count there.
    """
    wanted, course = measured.density * weights, measured.course
    if _beyond(measured, weights):
        return float(course.cost[-1] * wanted / course.kept[-1])
    return float(np.interp(wanted, course.kept, course.cost))


def _beyond(measured: Measured, weights: int) -> bool:
    """Whether more weights were kept than the largest budget can keep."""
    return bool(measured.density * weights > measured.course.kept[-1] > 0)


def _between(known: Sequence[Measured], places: Sequence[float], budgets: Floats) -> Floats:
    """The rises at budgets, going over from each measurement's course to the next one's."""
    logs = np.array([np.log(np.maximum(np.interp(budgets, e.course.cost, e.course.rise), LEAST)) for e in known])
    x = np.log(np.maximum(places, 1.0))
    share = np.array([np.interp(np.log(budgets), x, np.eye(len(x))[number]) for number in range(len(x))])
    return np.asarray(np.exp((share * logs).sum(axis=0)))


def _errors(
    known: Sequence[Measured], places: Sequence[float], budgets: Floats, missed: Sequence[tuple[float, float]]
) -> Floats:
    """The standard errors of the logarithms: of the measurements, and of going from one to the next."""
    x, at = np.log(np.maximum(places, 1.0)), np.log(budgets)
    measured = np.interp(at, x, [each.error for each in known])
    away = np.abs(at[:, None] - x[None, :]).min(axis=1)
    spacing = float(np.diff(x).mean()) if len(x) > 1 else 1.0
    if missed:
        spots, errors = zip(*missed, strict=True)
        # The median: one that is missed widely, as near a dense network whose loss fell, says nothing of those far off.
        near = np.maximum(float(np.median(errors)), np.interp(at, np.log(np.maximum(spots, 1.0)), errors))
    else:
        near = np.full_like(at, ASSUMED)
    return np.asarray(np.hypot(measured, near * np.minimum(2.0, 2 * away / max(spacing, LEAST))))


def _missed(known: Sequence[Measured], places: Sequence[float], weights: int) -> list[tuple[float, float]]:
    """The place of each measurement but the first and the last, and by how much the logarithm of its rise is missed
    when it is predicted from those beside it. One beyond its course has no rise there.
    """
    found = []
    for number in range(1, len(known) - 1):
        if _beyond(known[number], weights):
            continue
        beside = [number - 1, number + 1]
        at = np.array([places[number]])
        told = _between([known[i] for i in beside], [places[i] for i in beside], at)[0]
        true = _between([known[number]], [places[number]], at)[0]
        found.append((places[number], abs(math.log(told) - math.log(true))))
    return found
