"""Which levels come next, and when a level has seen enough, by hand; the intervals' coverage by simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scan_records import level

from pipeline.base.stats import paired_mean, tango
from pipeline.run.records import Level
from pipeline.scan import racing
from pipeline.settings.pruning import Scan


def scan(**changes: Any) -> Scan:
    return Scan.model_validate({"levels": [0.8, 0.4, 0.2, 0.1, 0.01], **changes})


def known(*points: tuple[float, float]) -> list[Level]:
    return [level(density, drop=drop) for density, drop in points]


def test_a_grid_measures_what_is_missing_of_it_whatever_else_is_known() -> None:
    assert racing.next_levels([], scan(), 1000) == [0.8, 0.4, 0.2, 0.1, 0.01]
    assert racing.next_levels(known((0.4, 0.0), (0.3, 0.1)), scan(), 1000) == [0.8, 0.2, 0.1, 0.01]
    assert racing.next_levels(known(*((d, 0.0) for d in scan().levels)), scan(), 1000) == []


def test_adaptive_starts_with_both_ends_and_the_middle() -> None:
    assert racing.next_levels([], scan(mode="adaptive"), 1000) == [0.8, 0.2, 0.01]
    assert racing.next_levels(known((0.2, 0.5)), scan(mode="adaptive"), 1000) == [0.8, 0.01]


def test_adaptive_goes_on_where_the_curve_bends() -> None:
    """Drops 0, 0, 0.02, 0.5 at 1, 0.8, 0.2, 0.01: only the last gap is over 0.05; sqrt(0.2 * 0.01) = 0.0447."""
    levels = known((0.8, 0.0), (0.2, 0.02), (0.01, 0.5))
    assert racing.next_levels(levels, scan(mode="adaptive"), 100_000) == [0.0447]


def test_adaptive_takes_the_widest_gaps_while_there_is_room() -> None:
    """Gaps of 0.1 (1 to 0.8), 0.2 (to 0.2) and 0.4 (to 0.01)."""
    levels = known((0.8, 0.1), (0.2, 0.3), (0.01, 0.7))
    every = [0.894, 0.4, 0.0447]
    assert racing.next_levels(levels, scan(mode="adaptive"), 100_000) == every
    assert racing.next_levels(levels, scan(mode="adaptive", max_levels=5), 100_000) == every[1:]
    assert racing.next_levels(levels, scan(mode="adaptive", max_levels=3), 100_000) == []


def test_adaptive_goes_on_as_if_it_had_not_stopped_between_the_levels_of_one_choice() -> None:
    """0.4 was measured, then the scan stopped; chosen anew from all that is known, 0.566 would come in."""
    three = [(0.8, 0.1), (0.2, 0.3), (0.01, 0.7)]
    levels = known(*three, (0.4, 0.29))
    assert racing.next_levels(levels, scan(mode="adaptive", max_levels=6), 100_000) == [0.894, 0.0447]
    whole = known(*three, (0.894, 0.0), (0.4, 0.29), (0.0447, 0.3))
    assert racing.next_levels(whole, scan(mode="adaptive", max_levels=6), 100_000) == []


def test_adaptive_stops_where_no_weight_lies_between_two_levels() -> None:
    """Ten weights: 0.2 keeps 2 and 0.01 keeps 1; halfway between 0.8 (8) and 0.2 is 0.4 (4)."""
    levels = known((0.8, 0.0), (0.2, 0.5), (0.01, 1.0))
    assert racing.next_levels(levels, scan(mode="adaptive"), 10) == [0.4]


def test_looks_double_and_there_is_one_without_racing() -> None:
    assert racing.looks(800, racing=True) == [50, 100, 200, 400, 800]
    assert racing.looks(800, racing=False) == [800]
    assert racing.looks(40, racing=True) == [40]
    assert racing.looks(52, racing=True) == [50, 51, 52]
    assert racing.looks(50_000, racing=True)[-1] == 50_000


def test_each_look_has_its_share_of_the_error() -> None:
    """Bonferroni: 2.5758 is the 99.5% point of the normal distribution, for 0.05 / 5 on two sides."""
    assert racing.critical(1) == pytest.approx(1.959964, abs=1e-6)
    assert racing.critical(5) == pytest.approx(2.575829, abs=1e-6)


def test_a_level_is_decided_when_its_interval_is_narrow_or_its_loss_is_hopeless() -> None:
    settings = scan(interval=0.02, hopeless=0.5)
    assert racing.decided(0.01, 0.05, 0.9, settings)
    assert not racing.decided(0.01, 0.06, 0.9, settings)
    assert racing.decided(0.46, 0.9, 0.9, settings)  # over half of 0.9
    assert not racing.decided(0.44, 0.9, 0.9, settings)
    assert not racing.decided(0.0, 0.0, 0.9, scan())


@pytest.mark.parametrize("drop", [0.0, 0.03, 0.3])
def test_intervals_at_the_look_that_stopped_hold_the_truth(drop: float) -> None:
    """400 races on fresh samples whose expected drop is known: at least 95% by construction, two points for chance."""
    draw = np.random.default_rng(7)
    settings = scan(interval=0.08)
    looks = racing.looks(1600, racing=True)
    z = racing.critical(len(looks))
    held, stops = 0, []
    for _ in range(400):
        lost = draw.random(1600) < drop + 0.04
        won = ~lost & (draw.random(1600) < 0.04 / (1 - drop - 0.04))
        for look in looks:
            low, high = tango(int(lost[:look].sum()), int(won[:look].sum()), look, z)
            if racing.decided(low, high, 0.9, settings):
                break
        held += low <= drop <= high
        stops.append(look)
    assert held >= 0.93 * 400
    assert np.mean(stops) < 1000  # and racing does stop before all samples


def test_the_interval_of_a_mean() -> None:
    """Mean 2, standard deviation 1 of three: t of 2 degrees is 4.3027, so 2 +- 4.3027 / sqrt(3)."""
    low, high = paired_mean(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert paired_mean(np.array([1.0])) == (-np.inf, np.inf)
