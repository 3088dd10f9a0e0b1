"""Shards that are replaced under a run: it stops, by one message, and goes on when the old ones are back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from faults.limits import command
from faults.runs import SETTINGS, Line, RayRun, newest_step, resumed_at, same_weights
from support import program
from tiny_run import NO_SCAN, TINY

from pipeline import stages
from pipeline.data import shards
from pipeline.local import LocalEngine
from pipeline.run.events import EpochEnded, Event, Progress, Resumed, unheard
from pipeline.settings.config import Config
from pipeline.train.world import World, choose_device

pytestmark = pytest.mark.faults

Tiny = Callable[..., Config]


def carry_out(config: Config, progress: Progress = unheard) -> str | None:
    """What `run` does: None, or the one message that it ends with."""
    return command(lambda: stages.run(config, LocalEngine(World(0, 1, choose_device("cpu"))), progress))


def other_shards(tiny: Tiny, folder: Path) -> None:
    """Shards of the same images, of which others are train, val and test."""
    shards.build(tiny().data, 1, str(folder))


def swap(one: Path, two: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


@pytest.mark.parametrize("when", ["in dense training", "after a round"])
def test_shards_replaced_between_two_starts(when: str, tiny: Tiny, tmp_path: Path, line: Line) -> None:
    root, others = tmp_path / "shards", tmp_path / "others"
    shards.build(tiny().data, 0, str(root))
    other_shards(tiny, others)
    quick = {"data.source": "shards", "data.root": str(root), "prune.allocation": "uniform"}
    config, undisturbed = (tiny(**quick, runs_dir=str(tmp_path / name)) for name in ("a", "b"))
    assert carry_out(undisturbed) is None
    phase = "dense" if when == "in dense training" else "rounds/02"

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(config, LocalEngine(World(0, 1, choose_device("cpu"))), stop)
    swap(root, others)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a/tiny").rglob("*.safetensors")}
    started = time.monotonic()
    message = carry_out(config)
    assert message is not None
    assert f"'{root}' holds other shards than the run in '{tmp_path}/a/tiny' was made from" in message
    was, now = (shards.load_manifest(str(folder)).identity for folder in (others, root))
    assert f"the data were {was} (1,293 train, 144 val, 360 test), and are {now}" in message
    assert "put the old shards back, or use another name=..." in message
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a/tiny").rglob("*.safetensors")}
    swap(root, others)
    seconds = time.monotonic() - started
    events: list[Event] = []
    assert carry_out(config, events.append) is None
    assert same_weights(tmp_path / "a/tiny", tmp_path / "b/tiny")
    assert any(isinstance(event, Resumed) and event.phase == phase for event in events)
    line(f"shards replaced between two starts, {when}", "stops cleanly", "<=10", seconds)


@pytest.mark.ray
def test_shards_replaced_under_a_restarted_worker(tiny: Tiny, tmp_path: Path, line: Line) -> None:
    """Refused by the worker that starts again, without further retries."""
    root, others = tmp_path / "shards", tmp_path / "others"
    settings = ["data.source=shards", f"data.root={root}", "retrain.epochs=1", "prune.dense_control=false", NO_SCAN]
    shards.build(tiny().data, 0, str(root))
    other_shards(tiny, others)
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "runs_dir": str(tmp_path / "runs")}))
    run = RayRun(config, tmp_path / "runs", *settings)
    victim = run.worker(1, "dense")
    run.wait(lambda: newest_step(run.folder / "dense/steps"))
    swap(root, others)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    run.finish(code=2)
    errors = [text for text in run.output.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert f"'{root}' holds other shards than the run in '{run.folder}' was made from" in errors[0]
    assert "max_failures" not in run.output
    seconds = time.monotonic() - killed
    swap(root, others)
    again = program("pipeline", "run", str(config), *SETTINGS, *settings, ray=False)
    assert again.returncode == 0, again.stderr
    assert resumed_at(again.stdout, "dense") > 0
    line("shards replaced under a restarted worker", "stops cleanly", "<=50", seconds)
