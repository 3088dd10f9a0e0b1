"""The allocation of least predicted damage under a budget of weights, FLOPs or packed bytes.

Each tensor has a curve of damage against cost, which is replaced by its lower convex hull. The hulls consist of
straight pieces. The pieces of all tensors are bought in the order of what they save for what they cost, the best first
(marginal greedy), until the budget is spent. On hulls this is the exact optimum of the Lagrangian relaxation, so it
gives a bound that no allocation beats. The last piece is cut to whole weights where it does not fit. The order of the
pieces does not depend on the budget: a smaller budget keeps no more of any tensor, as long as the same power composes
the damages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from pipeline.prune.damage import USUAL_POWER, Curve, total_rise
from pipeline.prune.forecast import ASSUMED, Course, Forecast, Measured, forecast

Cost = Callable[[int], int]  # kept weights -> cost of the tensor; never falls as more are kept
FREE = 1e-9  # stands for a cost of 0 in divisions


@dataclass(frozen=True)
class Priced:
    """What an allocation by damage needs of a tensor: its damage curve, and the cost of keeping its weights."""

    curve: Curve
    cost: Cost


class Held(NamedTuple):
    """How the tensors' damages make a rise of the loss.

    Damages are rises to `power`, and they add up. The measured rise was `scale` times the rise predicted from the sum.
    """

    power: float
    scale: float = 1.0
    error: float = ASSUMED  # standard error of the logarithm of a rise
    below: float = 0.0  # nats; how far the lower end of the measured rise's interval lies from it
    above: float = 0.0  # nats; and the upper end

    def rise(self, damage: float) -> float:
        """The rise of the loss (nats) for a sum of the tensors' damages."""
        return self.scale * total_rise(damage, self.power)


USUAL = Held(USUAL_POWER)


@dataclass(frozen=True)
class Solution:
    """What each tensor keeps, the total cost, the total predicted damage, and a lower bound on the damage.

    `forecast` is the rise (nats) that is predicted for the budget, with the ends of its 95% interval. Where it is None,
    the rise follows from the damage alone.
    """

    keep: dict[str, int]
    spent: int
    damage: float
    bound: float
    held: Held
    forecast: tuple[float, float, float] | None = None

    @property
    def rise(self) -> float:
        """The predicted rise of the loss, in nats."""
        return self.forecast[0] if self.forecast else self.held.rise(self.damage)

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the 95% interval of `rise`."""
        return self.forecast[1:] if self.forecast else (self.rise, self.rise)

    def rise_of(self, damage: float) -> float:
        """The rise of another allocation of the same cost, by its damage."""
        if self.damage <= 0:
            return self.held.rise(damage)
        return self.rise * total_rise(damage / self.damage, self.held.power)

    @property
    def least(self) -> float:
        """The rise that no allocation is predicted to get below."""
        return self.rise_of(self.bound)

    @property
    def gap(self) -> float:
        """How far above the optimum the predicted rise may be, in nats."""
        return self.rise - self.least


class _Piece(NamedTuple):
    """A piece of a tensor's hull between two corners: both corners as (cost, kept), and the damage at the second."""

    slope: float  # change of damage per cost, at most 0
    order: tuple[int, int]
    name: str
    low: tuple[int, int]
    high: tuple[int, int]
    damage: float


@dataclass(frozen=True)
class Frontier:
    """The pieces of all hulls within floors and caps in the order in which they are bought, for any budget."""

    priced: Mapping[str, Priced]
    floors: Mapping[str, int]
    pieces: list[_Piece]
    held: Held

    def course(self) -> Course:
        """What the allocations from the floors on cost, keep and are predicted to lose."""
        damages = {name: float(each.curve.at(self.floors[name])) for name, each in self.priced.items()}
        cost = [float(sum(each.cost(self.floors[name]) for name, each in self.priced.items()))]
        kept, damage = [float(sum(self.floors.values()))], [math.fsum(damages.values())]
        for piece in self.pieces:
            cost.append(cost[-1] + piece.high[0] - piece.low[0])
            kept.append(kept[-1] + piece.high[1] - piece.low[1])
            damage.append(damage[-1] + piece.damage - damages[piece.name])
            damages[piece.name] = piece.damage
        rises = [self.held.rise(max(0.0, each)) for each in damage]
        return Course(*(np.array(each, np.float64) for each in (cost, kept, rises)))

    def spend(self, budget: int) -> Solution:
        """The least predicted damage within the budget, which must cover the floors.

        A budget of weights is met exactly where the caps allow it. Of a budget of FLOPs or bytes, less than the cost of
        one more weight is left over.
        """
        keep = dict(self.floors)
        left = budget - sum(each.cost(keep[name]) for name, each in self.priced.items())
        assert left >= 0
        hull = {name: float(each.curve.at(keep[name])) for name, each in self.priced.items()}  # where each stands on it
        for piece in self.pieces:
            price = piece.high[0] - piece.low[0]
            if price > left:
                hull[piece.name] += (piece.damage - hull[piece.name]) * left / price
                keep[piece.name] = _most(self.priced[piece.name].cost, piece.low, piece.high[1], left)
                break
            left -= price
            hull[piece.name], keep[piece.name] = piece.damage, piece.high[1]
        spent = sum(each.cost(keep[name]) for name, each in self.priced.items())
        damage = predicted(self.priced, keep)
        return Solution(keep, spent, damage, min(damage, math.fsum(hull.values())), self.held)


@dataclass(frozen=True)
class Composed:
    """The priced tensors for several powers, and the power and scale measured at some densities of all weights.

    `best` has at least one density.
    """

    by_power: Mapping[float, Mapping[str, Priced]]
    best: Mapping[float, Held]

    @property
    def prices(self) -> dict[str, Cost]:
        """What each tensor costs."""
        return {name: each.cost for name, each in next(iter(self.by_power.values())).items()}

    def at_prices(self, costs: Mapping[str, Cost]) -> Composed:
        """The same damages at other prices."""
        changed = {
            power: {name: replace(each, cost=costs[name]) for name, each in priced.items()}
            for power, priced in self.by_power.items()
        }
        return replace(self, by_power=changed)

    def at(self, density: float) -> Held:
        """The power and scale at the nearest measured density, in log density."""
        return self.best[min(self.best, key=lambda known: abs(math.log(known / max(density, FREE))))]

    def within(self, floors: Mapping[str, int], caps: Mapping[str, int]) -> Callable[[int], Solution]:
        """A function that solves a budget within floors and caps.

        It uses the power and scale measured nearest to the density of the solution itself. The predicted rise goes over
        from one measurement to the next: see `pipeline.prune.forecast`.
        """
        everything = sum(each.curve.weights for each in next(iter(self.by_power.values())).values())

        @cache
        def bought(held: Held) -> Frontier:
            return frontier(self.by_power[held.power], floors, caps, held)

        @cache
        def expected() -> Forecast:
            known = [
                Measured(at, held.error, bought(held).course(), held.below, held.above)
                for at, held in self.best.items()
            ]
            return forecast(known, everything)

        def spend(budget: int) -> Solution:
            held, tried = self.at(1.0), set[Held]()
            while True:
                found = bought(held).spend(budget)
                tried.add(held)
                held = self.at(sum(found.keep.values()) / everything)
                if held in tried:  # it was solved with this one already, or (FLOPs, bytes) the search circles
                    return replace(found, forecast=expected().at(budget))

        return spend


def frontier(
    priced: Mapping[str, Priced], floors: Mapping[str, int], caps: Mapping[str, int], held: Held = USUAL
) -> Frontier:
    """What can be bought within floors and caps, the best first; ties go to the first tensor."""
    pieces = [
        piece
        for number, (name, each) in enumerate(priced.items())
        for piece in _hull(name, number, each, floors[name], caps[name])
    ]
    return Frontier(priced, floors, sorted(pieces), held)


def solve(priced: Mapping[str, Priced], floors: Mapping[str, int], caps: Mapping[str, int], budget: int) -> Solution:
    """The least predicted damage within floors, caps and budget: see Frontier.spend."""
    return frontier(priced, floors, caps).spend(budget)


def predicted(priced: Mapping[str, Priced], keep: Mapping[str, int]) -> float:
    """The predicted damage: the sum over the tensors."""
    return math.fsum(float(each.curve.at(keep[name])) for name, each in priced.items())


def _hull(name: str, number: int, priced: Priced, floor: int, cap: int) -> list[_Piece]:
    """The pieces of the lower convex hull of damage over cost between floor and cap, the steepest first."""
    inner = priced.curve.kept[(priced.curve.kept > floor) & (priced.curve.kept < cap)]
    kept = sorted({floor, *inner.tolist(), cap})
    corners: list[tuple[int, int, float]] = []  # (cost, kept, damage)
    for count, damage in zip(kept, priced.curve.at(np.array(kept)).tolist(), strict=True):
        cost = priced.cost(count)
        while corners and corners[-1][0] >= cost and len(corners) > 1:
            corners.pop()  # costs the same and keeps less
        while len(corners) > 1 and _above(corners[-2], corners[-1], (cost, count, damage)):
            corners.pop()
        corners.append((cost, count, damage))
    pieces: list[_Piece] = []
    for low, high in itertools.pairwise(corners):
        slope = (high[2] - low[2]) / max(high[0] - low[0], FREE)
        slope = max(slope, pieces[-1].slope) if pieces else slope  # rounding must not change their order
        pieces.append(_Piece(slope, (number, len(pieces)), name, low[:2], high[:2], high[2]))
    return pieces


def _above(first: tuple[int, int, float], middle: tuple[int, int, float], last: tuple[int, int, float]) -> bool:
    """Whether the middle point lies on or above the line between the others, and so is no corner of the hull."""
    return (middle[2] - first[2]) * (last[0] - first[0]) >= (last[2] - first[2]) * (middle[0] - first[0])


def _most(cost: Cost, low: tuple[int, int], most: int, money: int) -> int:
    """The largest count from low's up to `most` whose cost is at most `money` above low's; by bisection."""
    limit, below, above = low[0] + money, low[1], most
    while below < above:
        middle = (below + above + 1) // 2
        below, above = (middle, above) if cost(middle) <= limit else (below, middle - 1)
    return below


Keep = dict[str, int]  # the weights that each tensor keeps
