"""The course of a run's trainings: which events become lines, and their places on one rising axis."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.run import course
from pipeline.run.course import Moment, placed
from pipeline.run.events import EpochEnded, Paced, RoundBegun
from pipeline.run.records import Epoch
from pipeline.run.state import Run


def at(phase: str, step: int, steps: int, val: float | None = 0.9, loss: float = 0.5) -> Moment:
    return Moment(1000, phase, step, steps, 1.0, loss, val_top1=val)


def places(*moments: Moment) -> list[int]:
    return [each.at for each in placed(moments)]


def test_trainings_stand_one_after_the_other() -> None:
    assert places(at("dense", 10, 20), at("dense", 20, 20), at("rounds/01", 5, 10), at("rounds/01", 10, 10)) == [
        10, 20, 25, 30,
    ]  # fmt: skip


def test_what_a_resumed_training_does_again_is_left_out() -> None:
    again = [at("dense", 10, 30), at("dense", 20, 30), at("dense", 10, 30), at("dense", 20, 30), at("dense", 30, 30)]
    assert places(*again) == [10, 20, 30]
    assert places(*again, at("dense", 20, 30), at("dense", 30, 30)) == [10, 20, 30]  # after its last epoch too


def test_a_second_attempt_at_a_round_stands_behind_the_first() -> None:
    first, second = [at("rounds/01", n, 20, 0.5) for n in (10, 20)], [at("rounds/01", n, 20, 0.6) for n in (10, 20)]
    assert places(*first, *second) == [10, 20, 30, 40]


def test_after_what_an_older_program_did() -> None:
    assert [each.at for each in placed([at("dense", 10, 10)], before=100)] == [110]


@given(
    st.lists(
        st.tuples(st.sampled_from(["dense", "a", "b"]), st.integers(1, 30), st.sampled_from([0.1, 0.2, None])),
        max_size=40,
    )
)
def test_places_only_rise_and_stay_when_the_course_grows(drawn: list[tuple[str, int, float | None]]) -> None:
    moments = [at(phase, step, 30, val) for phase, step, val in drawn]
    whole = placed(moments)
    assert all(a.at < b.at for a, b in itertools.pairwise(whole))
    for end in range(len(moments)):
        assert placed(moments[:end]) == whole[: len(placed(moments[:end]))]


def epoch(number: int, step: int) -> Epoch:
    return Epoch(number, step, 0.25, 0.1, 0.9, "ab", 1.0, 800.0, 0.1)


def test_an_epoch_and_long_waits_between_become_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(course.time, "monotonic", lambda: clock[0])
    (tmp_path / "lease.json").write_text('{"fence": 0}')
    told: list[str] = []
    with course.kept(Run(str(tmp_path), 0), told.append) as heard:
        heard(RoundBegun("rounds/01", 0.25, 100, 0, 0.5, {}, False))
        for step in range(0, 120, 5):  # every 5 s
            heard(Paced("rounds/01", step, 0, 640.0, 0.25, 0, 0, 0.7, 0.1, 200))
            heard(Paced("rounds/01", step, 1, 1.0, 1.0, 0, 0, 0.7, 0.1, 200))  # another rank
            clock[0] += 5.0
        heard(EpochEnded("rounds/01", epoch(1, 120), 2, 200))
    lines = course.read(str(tmp_path))
    assert told == []
    assert [line.step for line in lines] == [15, 45, 75, 105, 120]
    assert {line.density for line in lines} == {0.25}
    assert [line.val_top1 for line in lines] == [None, None, None, None, 0.9]
    assert (lines[0].images_per_s, lines[0].waiting, lines[0].loss, lines[0].lr) == (640.0, 0.25, 0.7, 0.1)


def test_a_journal_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    told: list[str] = []
    with course.kept(Run(str(tmp_path), 7), told.append) as heard:  # a run that was removed: it has no lease
        heard(EpochEnded("dense", epoch(1, 10), 2, 20))
        heard(EpochEnded("dense", epoch(2, 20), 2, 20))
    assert len(told) == 1
    assert "the run goes on" in told[0]


def test_a_run_that_is_older_has_no_course(tmp_path: Path) -> None:
    assert course.read(str(tmp_path)) == ()
