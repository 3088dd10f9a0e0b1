"""Predicted damage by hand; what curves must be, and how allocations spend them, is in test_budget."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scan_records import level, row, scan, tensor

from pipeline.prune import damage
from pipeline.run.records import DenseFigures, Level

ROOM = 2.0


def measured(density: float, rise: float, reach: float = 0.01) -> Level:
    return level(density, rise=rise, rise_low=rise - reach, rise_high=rise + reach)


def spread(density: float) -> float:
    """What a curve adds so that a budget is spread where no damage was seen: 1e-5 (1 / density - 1)."""
    return 1e-5 * (1 / density - 1)


def test_a_curve_of_two_levels_by_hand() -> None:
    """Rises of 0.1 at a half and 0.4 at a quarter, to the power 1/2. They double twice as the density halves, so the
    exponent is 2 (0.4 = 0.1 x 2^2), and at an eighth the rise is 0.4 x 4 = 1.6."""
    found = damage.curve([measured(0.5, 0.1), measured(0.25, 0.4)], 8, ROOM, power=0.5)
    assert found.kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert found.weights == 8
    assert found.at(8) == 0
    assert found.at(4) == pytest.approx(math.sqrt(0.1) + spread(0.5))
    assert found.at(2) == pytest.approx(math.sqrt(0.4) + spread(0.25))
    assert found.at(1) == pytest.approx(math.sqrt(1.6) + spread(0.125))
    assert found.at(0) == pytest.approx(math.sqrt(6.4) + spread(1 / 16))  # none counts as half a weight
    assert found.at(3.5) == pytest.approx((found.at(3) + found.at(4)) / 2)


def test_a_curve_without_levels_is_the_spread_alone() -> None:
    found = damage.curve([], 4, ROOM)
    assert found.damage == pytest.approx([spread(1 / 8), spread(1 / 4), spread(1 / 2), spread(3 / 4), 0])


def test_a_level_at_density_1_tells_nothing() -> None:
    with_it = damage.curve([measured(1.0, 0.7), measured(0.5, 0.1)], 8, ROOM)
    assert with_it.damage == pytest.approx(damage.curve([measured(0.5, 0.1)], 8, ROOM).damage)


def test_levels_nearer_to_chance_than_to_the_network_are_not_trusted() -> None:
    """Guessing costs 2 nats: 1.0 is halfway and is trusted, 1.01 is not, and is what 0.1 leads to instead."""
    first = measured(0.5, 0.1)
    trusted = damage.curve([first, measured(0.25, 1.0)], 8, ROOM, power=1.0)
    assert trusted.at(2) == pytest.approx(1.0 + spread(0.25))
    beyond = damage.curve([first, measured(0.25, 1.01)], 8, ROOM, power=1.0)
    assert beyond.at(2) == pytest.approx(0.1 * 2**2 + spread(0.25))  # USUAL: one level shows no exponent


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ([0.1, 0.4], 2.0),
        ([0.1, 0.8], 3.0),
        ([0.1, 0.11], 1.0),  # 0.14, and FLATTEST is 1
        ([0.0001, 0.1], 2.0),  # one clear rise alone: USUAL
        ([0.011, 0.011 * 2**7], 6.0),  # STEEPEST
        ([0.05, 0.1, 0.4, 1.6], 2.0),  # of the last three alone
    ],
)
def test_exponents_by_hand(rises: list[float], expected: float) -> None:
    """The density halves from level to level; an interval reaches 0.01 to either side."""
    logs = np.log([0.5 ** (i + 1) for i in range(len(rises))])
    assert damage.exponent(logs, np.array(rises), np.full(len(rises), 0.01)) == pytest.approx(expected)


def test_curves_have_a_scans_tensors_and_its_room() -> None:
    """10 classes and a loss of log 10 - 0.2 leave 0.2 nats to guessing: a rise of 0.1 is the last trusted."""
    levels = [measured(0.5, 0.1), measured(0.25, 0.11)]
    tensors = [tensor("a", 8, levels), tensor("b", 4, levels[:1])]
    found = damage.curves(scan(tensors, dense=DenseFigures(0.2, math.log(10) - 0.2)), 10, power=1.0)
    assert [(name, each.weights) for name, each in found.items()] == [("a", 8), ("b", 4)]
    assert found["a"].at(4) == pytest.approx(0.1 + spread(0.5))
    assert found["a"].at(2) == pytest.approx(0.4 + spread(0.25))  # by the usual exponent, not 0.11
    wide = damage.curves(scan(tensors, dense=DenseFigures(0.9, 0.3)), 10, power=1.0)
    assert wide["a"].at(2) == pytest.approx(0.11 + spread(0.25))


@pytest.mark.parametrize(
    ("classes", "loss", "expected"),
    [
        (10, 0.3, 2.0026),  # log 10 is 2.3026
        (2, 0.1, 0.5931),
        (10, 5.0, damage.FINEST),  # a network that is worse than guessing has nothing to lose
        (1, 0.0, damage.FINEST),
    ],
)
def test_the_rise_to_chance_by_hand(classes: int, loss: float, expected: float) -> None:
    found = scan([tensor("a", 4, [])], dense=DenseFigures(0.5, loss))
    assert damage.chance_rise(found, classes) == pytest.approx(expected, abs=5e-5)


def test_the_best_of_each_density() -> None:
    """At a half the power 1 lost least; at a tenth 0.7 and 0.5 lost alike and 0.7 is nearer to 0.85."""
    rows = [
        row(0.5, 0.3, 0.3), row(0.5, 1.0, 0.2), row(0.5, 0.85, 0.25),
        row(0.1, 0.5, 1.5), row(0.1, 0.7, 1.5), row(0.1, 0.85, math.inf),
        row(0.05, 0.85, math.nan), row(0.05, 0.3, 2e6),
    ]  # fmt: skip
    best = damage.best_together(rows)
    assert {density: each.power for density, each in best.items()} == {0.5: 1.0, 0.1: 0.7, 0.05: 0.85}
    assert [*best] == [0.5, 0.1, 0.05]


@pytest.mark.parametrize(
    ("rise", "expected"), [(0.25, 0.25), (-0.1, -0.1), (math.inf, 1e6), (-math.inf, 1e6), (math.nan, 1e6)]
)
def test_a_rise_that_is_no_number_is_the_worst(rise: float, expected: float) -> None:
    assert damage.finite(rise) == expected


def test_damages_make_a_rise() -> None:
    """At 1 rises add up; at 1/2 their roots do: (0.3 + 0.4)^2 is 0.49, of rises of 0.09 and 0.16."""
    assert damage.total_rise(0.7, 1.0) == 0.7
    assert damage.total_rise(math.sqrt(0.09) + math.sqrt(0.16), 0.5) == pytest.approx(0.49)
