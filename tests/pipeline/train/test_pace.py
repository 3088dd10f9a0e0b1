"""How fast a training goes, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline import stages
from pipeline.local import LocalEngine
from pipeline.run.events import EpochEnded, Event, Paced, Saved
from pipeline.settings.config import Config
from pipeline.train import loop, pace
from pipeline.train.pace import Pace
from pipeline.train.world import World


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def test_time_is_divided_into_waiting_and_steps(clock: Clock) -> None:
    def slow() -> Iterator[int]:
        for item in range(4):
            clock.now += 3  # to read it
            yield item

    counted = Pace()
    for _ in counted.timed(slow()):
        clock.now += 1  # to train on it
        counted.stepped()
    clock.now += 100
    counted.without(100)
    assert counted.taken() == (4 / 16, 12 / 16)
    clock.now += 10
    assert counted.taken() == (0.0, 0.0)
    assert counted.epoch_ended() == (4 / 26, 12 / 26)
    clock.now += 10
    assert counted.epoch_ended() == (0.0, 0.0)


def test_what_it_times_is_closed_with_it(clock: Clock) -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    for _ in Pace().timed(items()):
        break
    assert closed == [True]


def test_a_training_tells_its_pace_and_its_checkpoints(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TELL_EVERY_S", 0.0)
    events: list[Event] = []
    config = tiny(**{"tracking.enabled": False, "prune.rounds": 1, "dense.checkpoint_steps": 5})
    began = time.monotonic()
    stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), events.append)
    took = time.monotonic() - began
    told = [event for event in events if isinstance(event, Paced) and event.phase == "dense"]
    assert told
    assert all(each.rank == 0 and each.images_per_s > 0 and 0 <= each.waiting <= 1 for each in told)
    assert (told[-1].bad, told[0].step) == (0, 1)
    epochs = [event.epoch for event in events if isinstance(event, EpochEnded) and event.phase == "dense"]
    assert epochs
    assert all((each.images_per_s or 0) > 0 and 0 <= (each.waiting or 0) <= 1 for each in epochs)
    saved = [event for event in events if isinstance(event, Saved) and event.phase == "dense"]
    assert [each.step % 5 for each in saved] == [0] * len(saved)
    assert 0 < sum(each.seconds for each in saved) < took
