"""Predicted rises between measurements: continuous, never falling as the budget shrinks, exact where measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_records import level, row, scan, tensor

from pipeline.base.stats import Z95
from pipeline.prune import round_plan
from pipeline.prune.forecast import ASSUMED, Course, Measured, forecast


def course(scale: float) -> Course:
    """Of 1000 weights at a price of 1 each; the rise is scale / density."""
    cost = np.linspace(10.0, 1000.0, 100)
    return Course(cost, cost, scale * 1000.0 / cost)


def test_a_measured_rise_is_predicted_as_it_was_measured() -> None:
    found = forecast([Measured(0.5, 0.1, course(1.0)), Measured(0.2, 0.1, course(3.0))], 1000)
    assert found.at(500)[0] == pytest.approx(2.0)
    assert found.at(200)[0] == pytest.approx(15.0)


def test_measurements_that_no_budget_reaches_do_not_all_stand_at_the_largest_one() -> None:
    """A quarter of the weights is alive. At that quarter the nearest measurements tell, not the farthest, at 0.8."""
    cost = np.linspace(10.0, 250.0, 25)
    reach = Course(cost, cost, 1000.0 / cost)

    def measured(density: float, scale: float) -> Measured:
        return Measured(density, 0.1, reach._replace(rise=scale * reach.rise))

    found = forecast([measured(0.8, 50.0), measured(0.3, 1.0), measured(0.2, 1.0), measured(0.1, 1.0)], 1000)
    assert found.at(250)[0] == pytest.approx(4.0, rel=1e-6)
    assert found.at(200)[0] == pytest.approx(5.0, rel=1e-6)


def test_halfway_the_prediction_is_the_geometric_mean_of_both() -> None:
    """Halfway in the logarithm between 0.5 and 0.2, at density sqrt(0.1): rises 1 and 3 over it."""
    found = forecast([Measured(0.5, 0.1, course(1.0)), Measured(0.2, 0.1, course(3.0))], 1000)
    middle = math.sqrt(0.1)
    assert found.at(1000 * middle)[0] == pytest.approx(math.sqrt(3.0) / middle, rel=0.01)


def test_a_smaller_scale_further_down_does_not_make_the_prediction_fall() -> None:
    """The second measurement says a third of what the first one does: between them the prediction waits."""
    found = forecast([Measured(0.5, 0.1, course(3.0)), Measured(0.4, 0.1, course(1.0))], 1000)
    rises = [found.at(budget)[0] for budget in np.linspace(1000, 10, 1500)]
    assert (np.diff(rises) >= 0).all()
    assert found.at(400)[0] == pytest.approx(found.at(500)[0]) == pytest.approx(6.0)


def test_the_interval_is_that_of_the_measurement_and_grows_away_from_it() -> None:
    found = forecast([Measured(0.5, 0.1, course(1.0)), Measured(0.125, 0.1, course(1.0))], 1000)
    rise, low, high = found.at(500)
    assert (low, high) == pytest.approx((rise * math.exp(-0.196), rise * math.exp(0.196)), rel=1e-3)
    rise, low, high = found.at(250)  # halfway, with nothing that says how far off that is
    assert high / rise == pytest.approx(math.exp(1.96 * math.hypot(0.1, ASSUMED)), rel=1e-2)


def test_the_interval_reaches_as_far_as_that_of_the_measurement_where_the_rise_is_small() -> None:
    """Near the dense network a factor says too little: a loss that may have fallen has no logarithm."""
    measured = [Measured(0.5, 0.1, course(1.0), 3.0, 1.0), Measured(0.125, 0.1, course(1.0), 0.0, 0.0)]
    found = forecast(measured, 1000)
    assert found.at(500) == pytest.approx((2.0, -1.0, 3.0))
    assert found.at(900)[1] == pytest.approx(1000 / 900 - 3, rel=1e-2)
    rise, low, high = found.at(125)
    assert (low, high) == pytest.approx((rise * math.exp(-0.196), rise * math.exp(0.196)), rel=1e-3)
    below = rise - low
    assert found.at(250)[1] < 4.0 - below / 2  # it goes over from the one to the other


def test_a_measurement_that_its_neighbours_miss_widens_the_interval_beside_it() -> None:
    """Rises over a density of 1, 1, 4, 1, 1: the middle one is missed by log 4, those beside it by half of that."""
    known = [
        Measured(at, 0.0, course(scale)) for at, scale in zip((0.8, 0.4, 0.2, 0.1, 0.05), (1, 1, 4, 1, 1), strict=True)
    ]
    found = forecast(known, 1000)
    spacing, halfway = math.log(0.8 / 0.05) / 4, 1000 * math.sqrt(0.4 * 0.2)
    assert spacing == pytest.approx(math.log(2))
    rise, _, high = found.at(halfway)  # between one that was missed by log 2 and one that was missed by log 4
    assert math.log(high / rise) / Z95 == pytest.approx(1.5 * math.log(2), rel=0.02)
    rise, _, high = found.at(1000 * math.sqrt(0.8 * 0.4))  # beside one that was missed by log 2 only
    assert math.log(high / rise) / Z95 == pytest.approx(math.log(2), rel=0.02)


def test_a_loss_that_fell_is_within_the_interval_of_what_is_predicted() -> None:
    """A scan whose largest density lowered the loss by 0.02, give or take 0.01: no rise is predicted there."""
    names = ["a", "b"]
    made = [tensor(name, 1000, [level(d, rise=r) for d, r in ((0.8, 0.0), (0.5, 0.1), (0.2, 1.0))]) for name in names]
    rows = [
        row(at, 1.0, rise, rise_low=rise - 0.01, rise_high=rise + 0.01, keep=dict.fromkeys(names, int(1000 * at)))
        for at, rise in ((0.8, -0.02), (0.5, 0.2), (0.2, 1.5))
    ]
    found = round_plan.scanned("weights", scan(made, together=tuple(rows)), 10, dict.fromkeys(names, 2000))
    solved = found.damages.within(dict.fromkeys(names, 1), dict.fromkeys(names, 1000))(1600)
    low, high = solved.interval
    assert 0 <= solved.rise < 0.001
    assert low == pytest.approx(solved.rise - 0.03, abs=2e-3)
    assert high == pytest.approx(solved.rise + 0.01, abs=2e-3)


levels = st.lists(st.floats(0.001, 5.0), min_size=3, max_size=3)


@settings(max_examples=40)
@given(
    tensors=st.lists(levels, min_size=2, max_size=4),
    together=st.lists(st.floats(-0.1, 6.0), min_size=1, max_size=4),
    powers=st.lists(st.sampled_from([0.3, 0.5, 0.85, 1.0]), min_size=4, max_size=4),
)
def test_of_any_scan_the_prediction_never_falls_and_never_jumps(
    tensors: list[list[float]], together: list[float], powers: list[float]
) -> None:
    densities = (0.8, 0.5, 0.2)
    made = [
        tensor(
            f"t{number}",
            1000,
            [
                level(density, rise=rise, rise_low=rise - 0.1, rise_high=rise + 0.1)
                for density, rise in zip(densities, sorted(rises), strict=True)
            ],
        )
        for number, rises in enumerate(tensors)
    ]
    names, at = [each.name for each in made], (0.7, 0.4, 0.2, 0.1)
    rows: list[Any] = [
        row(
            density,
            power,
            rise,
            rise_low=rise - 0.2,
            rise_high=rise + 0.2,
            keep=dict.fromkeys(names, int(1000 * density)),
        )
        for density, power, rise in zip(at, powers, together, strict=False)
    ]
    found = round_plan.scanned("weights", scan(made, together=tuple(rows)), 10, dict.fromkeys(names, 2000))
    everything = dict.fromkeys(names, 1000)
    spend = found.damages.within(dict.fromkeys(names, 1), everything)
    solved = [spend(int(budget)) for budget in np.geomspace(1000 * len(names), 20 * len(names), 120)]
    rises = np.array([each.rise for each in solved])
    assert (np.diff(rises) >= -1e-9).all()
    assert np.diff(rises).max() < 0.25 * rises.max()  # of budgets that differ by a fortieth
    assert all(each.interval[0] <= each.rise <= each.interval[1] for each in solved)
