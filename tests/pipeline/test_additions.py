"""What docs/architecture.md says of additions: a function and a row, and a run takes it by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import additions
import pytest
import torch
from additions import Noting
from tiny_run import ALONE, carry_out, final_weights

from pipeline import stages
from pipeline.data.sources import SOURCES
from pipeline.local import LocalEngine
from pipeline.prune.allocation import ALLOCATIONS
from pipeline.prune.criteria import CRITERIA
from pipeline.prune.patterns import PATTERNS
from pipeline.run.events import Event, StageBegun
from pipeline.run.layout import round_folder
from pipeline.run.records import RoundPlan
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config
from pipeline.task.feed import TASKS
from pipeline.train import checkpoint
from pipeline.train.world import configure_process

PAGE = Path(__file__).parents[2] / "docs/architecture.md"
ONE_ROUND = {"prune.rounds": 1, "prune.dense_control": False, "dense.epochs": 1, "retrain.epochs": 0}


def test_a_criterion_an_allocation_and_a_source(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "smallest", additions.CRITERION)
    monkeypatch.setitem(ALLOCATIONS, "in-order", additions.ALLOCATION)
    monkeypatch.setitem(SOURCES, "bars", additions.SOURCE)
    added = {"data.source": "bars", "prune.criterion": "smallest", "prune.allocation": "in-order"}
    config = tiny(**added, **ONE_ROUND, **{"target.compression": 2})
    result = carry_out(config)
    # 50,000 weights of 64 x 300 + 300 x 100 + 100 x 8, of which a half: fc1 whole, 5,798 of fc2, and fc3's least.
    assert [layer["kept"] for layer in result["layers"]] == [19_200, 5_799, 1]
    assert result["test"]["samples"] == 80
    run = Run(run_root(config), 0)
    dense = checkpoint.load(run, "dense/checkpoint").weights["fc2.weight"].abs()
    kept = final_weights(config)["fc2.weight"] != 0
    assert dense[kept].max() < dense[~kept].min()


def test_a_pattern_and_a_task(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATTERNS, "front", additions.PATTERN)
    monkeypatch.setitem(TASKS, "parity", additions.PARITY)
    added = {"prune.pattern": "front", "task": "parity", "model.factory": "additions:network", "model.kwargs": {}}
    config = tiny(**added, **{"prune.allocation": "uniform", "prune.rounds": 1, "dense.epochs": 3, "dense.lr": 0.1})
    result = carry_out(config)
    weights = final_weights(config)
    for tensor in Run(run_root(config), 0).load(RoundPlan, round_folder(1), "plan.json").tensors:
        expected = torch.arange(tensor.weights) < tensor.keep
        assert torch.equal(weights[tensor.name].flatten() != 0, expected)
    assert result["val"]["dense"]["top1"] > 0.7  # odd or even: a guess would be right in half


def test_a_stage_and_an_engine(tiny: Callable[..., Config]) -> None:
    config, events = tiny(**{"prune.allocation": "uniform", "dense.epochs": 1}), list[Event]()
    configure_process(config.threads)
    engine = Noting(LocalEngine(ALONE))
    with open_run(config) as here:
        driver = stages.Driver(config, engine, here, events.append)
        for _ in range(2):
            stages.carry_out([stages.SHARDS, stages.DENSE, additions.STAGE], driver)
        assert here.read("counted", "tensors.json") == {"tensors": 3}
    assert engine.done == ["dense"]
    told = [(event.stage, event.skipped) for event in events if isinstance(event, StageBegun)]
    names = ["shards", "dense", "counted"]
    assert told == [*((name, False) for name in names), *((name, True) for name in names)]


@pytest.mark.parametrize("word", ["CRITERIA", "STATISTICS", "ALLOCATIONS", "SCHEDULES", "PATTERNS", "TASKS", "SOURCES"])
def test_the_page_names_the_file_that_holds_each_row(word: str) -> None:
    [row] = [line for line in PAGE.read_text().splitlines() if f"`{word}`" in line]
    files = [part for part in row.split("`") if part.endswith(".py")]
    assert any(f"\n{word}: " in (PAGE.parents[1] / "pipeline" / file).read_text() for file in files)
