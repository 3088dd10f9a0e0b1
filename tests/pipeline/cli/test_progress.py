"""How far a run is, from its events alone: stage, round, and the time that is left, worked out by hand."""

from __future__ import annotations

import pytest

from pipeline.cli.progress import Tracker
from pipeline.run.events import (
    Doing,
    EpochEnded,
    Event,
    LevelMeasured,
    Outlined,
    Paced,
    RoundBegun,
    StageBegun,
    Stepped,
)
from pipeline.run.records import Epoch, Level

LEVEL = Level(
    samples=10, top1=0.5, low=0.2, high=0.8, drop=0.1, drop_low=0.0, drop_high=0.2, loss=1.0, rise=0.1, rise_low=None,
    rise_high=None, density=0.5, kept=5, absolute=0.5, quality=1.0, method="whole",
)  # fmt: skip
OUTLINE = Outlined(
    ("shards", "dense", "scan", "rounds", "final"), rounds=2, dense=600, round=300, scan=900, control=True
)


def stage(name: str, number: int, skipped: bool = False) -> StageBegun:
    return StageBegun(name, name, skipped, number, 5)


def epoch(phase: str, number: int, step: int, steps: int, epochs: int) -> EpochEnded:
    return EpochEnded(phase, Epoch(number, step, 0.25, 0.1, 0.9, "0", 1.0, 640.0, 0.0), epochs, steps)


def begun(phase: str, density: float) -> RoundBegun:
    return RoundBegun(phase, density, 100, 0, 0.8, {}, False)


def told(*events: tuple[float, Event]) -> Tracker:
    tracker = Tracker()
    for when, event in events:
        tracker(event, when)
    return tracker


BEGIN = [(0.0, stage("shards", 1)), (1.0, OUTLINE), (1.0, stage("dense", 2))]


def test_nothing_is_said_of_what_is_left_before_a_pace_is_known() -> None:
    tracker = told(*BEGIN)
    assert tracker.left_s is None
    assert tracker.place() == "stage 2 of 5: dense"
    assert tracker.times(61) == "1 min 01 s gone"


def test_what_is_left_follows_from_the_images_and_the_pace() -> None:
    # 600 dense, 900 / 3 = 300 of the scan, 2 x 300 of rounds, as much of the control: 2,100 in all.
    tracker = told(*BEGIN, (4.0, epoch("dense", 1, 10, 20, 2)))  # 300 of them in 3 s: 100 a second
    assert tracker.left_s == pytest.approx(18.0)
    assert tracker.figures() == ["640 images/s", "loss 0.25", "val 90.00%"]
    later = told(
        *BEGIN, (4.0, epoch("dense", 1, 10, 20, 2)), (7.0, epoch("dense", 2, 20, 20, 2)), (8.0, stage("scan", 3))
    )
    assert later.left_s == pytest.approx(15.0)
    later(LevelMeasured("fc1.weight", LEVEL, 5, 10), 14.0)  # half of the scan in 6 s: 750 images in 12 s by now
    assert later.left_s == pytest.approx((150 + 1200) * 12 / 750)


def test_what_is_begun_between_trainings_is_said() -> None:
    tracker = told(*BEGIN, (4.0, epoch("dense", 2, 20, 20, 2)), (5.0, Doing("rounds/01: layers are reconstructed")))
    assert (tracker.doing, tracker.share) == ("rounds/01: layers are reconstructed", None)
    left = tracker.left_s
    tracker(begun("rounds/01", 0.5), 90.0)  # it is none of the time that images take
    tracker(Stepped("rounds/01", 5, 10), 90.0 + 0.75)
    assert left is not None
    assert tracker.left_s is not None
    assert tracker.left_s < left


def test_a_slow_beginning_is_forgotten() -> None:
    """10 images in the first 100 s, as on a machine that has yet to warm up, then one a second."""
    tracker = told(*BEGIN, (101.0, Stepped("dense", 1, 60)))
    assert tracker.left_s == pytest.approx(2090 * 10.0)
    for step in range(2, 56):
        tracker(Stepped("dense", step, 60), 101.0 + 10 * (step - 1))
    assert tracker.left_s == pytest.approx(1550 * 1.0, rel=0.02)


def test_a_round_is_named_and_what_came_before_it_is_not_left() -> None:
    tracker = told(
        (0.0, stage("shards", 1, skipped=True)), (0.0, OUTLINE), (0.0, stage("dense", 2, skipped=True)),
        (0.0, stage("scan", 3, skipped=True)), (0.0, stage("rounds", 4)), (1.0, begun("rounds/02", 0.25)),
        (2.0, Stepped("rounds/02", 5, 10)), (2.0, Paced("rounds/02", 5, 0, 150.0, 0.0, 0, 0)),
    )  # fmt: skip
    assert tracker.place() == "stage 4 of 5: rounds, round 2 of 2"
    assert tracker.left_s == pytest.approx((150 + 600) / 150)  # the half of this round, and the control
    assert "density 25.00%" in tracker.figures()
    assert "150 images/s" in tracker.figures()
    tracker(Stepped("rounds/control-01", 5, 10), 5.0)
    assert tracker.place() == "stage 4 of 5: rounds, round 1 of 2, dense control"


def test_where_the_rounds_are_not_fixed_no_end_is_foretold() -> None:
    open_end = Outlined(("shards", "dense", "rounds", "final"), None, 600, 300, 0, True)
    tracker = told((0.0, open_end), (0.0, stage("dense", 2)), (1.0, epoch("dense", 1, 10, 20, 2)))
    tracker(stage("rounds", 3), 2.0)
    tracker(begun("rounds/03", 0.1), 3.0)
    assert tracker.left_s is None
    assert tracker.place() == "stage 3 of 5: rounds, round 3"
