"""What a person reads while a run goes on."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from pipeline import stages
from pipeline.cli import console
from pipeline.export.bench import Bench
from pipeline.export.latency import Latency
from pipeline.local import LocalEngine
from pipeline.run.events import Event, Stepped
from pipeline.run.result import LatencySummary
from pipeline.settings.config import Config
from pipeline.train import loop
from pipeline.train.world import World


def test_a_log_shows_the_steps_of_a_long_epoch(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "TELL_EVERY_S", 0.0)
    monkeypatch.setattr(console, "STEPS_EVERY_S", 0.0)
    text, events = io.StringIO(), list[Event]()
    display = console.Display(Console(file=text, width=200))

    def progress(event: Event) -> None:
        events.append(event)
        display(event)

    config = tiny(**{"prune.allocation": "uniform", "dense.epochs": 1, "prune.rounds": 1, "retrain.epochs": 1})
    stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), progress)
    told = [event.step for event in events if isinstance(event, Stepped) and event.phase == "dense"]
    steps = next(event.steps for event in events if isinstance(event, Stepped) and event.phase == "dense")
    assert told == list(range(1, steps + 1))
    assert f"dense: 3/{steps}" in text.getvalue()


def test_a_form_that_is_missing_has_a_row_that_says_why() -> None:
    rows = tuple(Latency(name, 1, 2.0, 1.0, 3.0, 4000, 100) for name in ("dense", "pruned"))
    summary = LatencySummary(device="cpu", batch=1, dense=2.0, pruned=2.0, compact=None, verdict=None)
    text = io.StringIO()
    missing = {"CSR": "no [sparse] kernel"}
    console.show_bench(Bench(rows, "no faster", {}, {}, (), summary, missing), Console(file=text, width=200))
    [line] = [line for line in text.getvalue().splitlines() if "CSR" in line]
    assert "none: no [sparse] kernel" in line
