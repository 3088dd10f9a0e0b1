"""What a person reads while a run goes on: a log with few lines, and one block on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from pipeline import stages
from pipeline.cli.display import Display
from pipeline.local import LocalEngine
from pipeline.run.events import EpochEnded, Event, Noted, Outlined, RoundBegun, StageBegun, Stepped, Warned
from pipeline.run.records import Epoch
from pipeline.settings.config import Config
from pipeline.train import loop
from pipeline.train.world import World


def log() -> tuple[Display, io.StringIO]:
    text = io.StringIO()
    return Display(Console(file=text, width=200, force_terminal=False)), text


def test_with_no_seconds_between_lines_a_log_shows_every_step(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TELL_EVERY_S", 0.0)
    monkeypatch.setenv("SECATEUR_LINE_SECONDS", "0")
    events = list[Event]()
    display, text = log()

    def progress(event: Event) -> None:
        events.append(event)
        display(event)

    config = tiny(**{"prune.allocation": "uniform", "dense.epochs": 1, "prune.rounds": 1, "retrain.epochs": 1})
    stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), progress)
    told = [event.step for event in events if isinstance(event, Stepped) and event.phase == "dense"]
    steps = next(event.steps for event in events if isinstance(event, Stepped) and event.phase == "dense")
    assert told == list(range(1, steps + 1))
    assert f"dense: 3/{steps}" in text.getvalue()
    [outline] = [event for event in events if isinstance(event, Outlined)]
    # 1,293 train samples make 20 steps of 64 images; one round, no scan.
    assert outline == Outlined(("shards", "dense", "rounds", "final"), 1, 20 * 64, 20 * 64, 0, True)
    numbered = [(event.number, event.count) for event in events if isinstance(event, StageBegun)]
    assert numbered == [(1, 4), (2, 4), (3, 4), (4, 4)]


def epochs(phase: str, count: int) -> list[Event]:
    return [
        EpochEnded(phase, Epoch(n, 20 * n, 0.1, 0.1, 0.95, "0", 0.2, 900.0, 0.01), count, 20 * count)
        for n in range(1, count + 1)
    ]


def test_a_log_of_540_short_epochs_has_a_line_for_each_end_and_no_more() -> None:
    """As many trainings and epochs as configs/demo.yaml has."""
    display, text = log()
    phases = ["dense", *(f"rounds/0{n}" for n in range(1, 5)), *(f"rounds/control-0{n}" for n in range(1, 5))]
    with display:
        for phase in phases:
            if phase[-2:].isdigit() and "control" not in phase:
                display(RoundBegun(phase, 0.5, 100, 0, 0.9, {}, False))
            for event in epochs(phase, 60):
                display(event)
    lines = text.getvalue().splitlines()
    assert len(lines) == 1 + 4 + 9  # the date, rounds that begin, trainings that end
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line.split()[1] for line in lines if "epoch 60/60" in line] == [f"{phase}:" for phase in phases]


def test_what_must_be_known_is_shown_at_once_and_a_long_epoch_every_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECATEUR_LINE_SECONDS", "30")
    display, text = log()
    display(StageBegun("dense", "dense network", False, 2, 5))
    display(Warned("a rank is slow"))
    display(Noted("a note"))
    display(Stepped("dense", 3, 100))
    assert "3/100" not in text.getvalue()
    display.last_line -= 31
    display(Stepped("dense", 4, 100))
    display(Stepped("dense", 5, 100))
    lines = [line[9:] for line in text.getvalue().splitlines()[1:]]
    assert lines[:3] == ["stage 2 of 5: dense network: started", "warning: a rank is slow", "a note"]
    assert len(lines) == 4
    assert re.fullmatch(r"dense: 4/100 \[stage 2 of 5: dense network, \S+ s gone\]", lines[3])


def test_a_terminal_has_one_block_and_lines_only_for_what_stays() -> None:
    text = io.StringIO()
    display = Display(Console(file=text, width=100, force_terminal=True, highlight=False))
    display(StageBegun("rounds", "rounds", False, 4, 5))
    with display:
        for event in epochs("rounds/02", 3):
            display(event)
        block = [str(row) for row in display.block().renderables]
    assert block[0].startswith("stage 4 of 5: rounds, round 2 · ")
    assert block[1].endswith("rounds/02: epoch 3 of 3")
    assert block[2] == "900 images/s · loss 0.1 · val 95.00%"
    assert "epoch 1/3" not in text.getvalue()
    assert "epoch 3/3" in text.getvalue()
