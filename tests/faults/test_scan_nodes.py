"""Nodes and workers that die under the scan: it goes on by itself, and finds what it would have found."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.moments import measured
from faults.ray_nodes import Nodes
from faults.runs import SETTINGS as HEAVY
from faults.runs import Line, Started, same_weights
from support import processes_in, program
from tiny_run import TINY

from pipeline.scan.known import LEVELS, TOGETHER

pytestmark = [pytest.mark.ray, pytest.mark.faults]
LEVELS_EACH = 20
# One image at a time: both parts of the scan take seconds, the rest of the run does not.
SETTINGS = [
    "data.val_fraction=0.3", "data.eval_batch=1",
    "prune.allocation=budget", "prune.dense_control=false", "prune.rounds=1", "dense.epochs=2", "retrain.epochs=1",
    "cluster.workers=1",
]  # fmt: skip
SCAN: dict[str, Any] = {
    "levels": [round(1 - n / 21, 4) for n in range(1, LEVELS_EACH + 1)],
    "together": [0.8, 0.5, 0.2],
}
# What processes that measure are called.
WORDS = {LEVELS: "ScanTrial", TOGETHER: "answer_pruned"}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    config: Path
    run: Path
    seconds: float  # of its scan, without Ray


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "scan": SCAN, "runs_dir": str(root / "runs")}))
    done = program("pipeline", "run", str(config), *HEAVY, *SETTINGS, ray=False)
    assert done.returncode == 0, done.stderr
    run = root / "runs/tiny"
    return Undisturbed(config, run, scan_seconds(run))


def scan_seconds(run: Path) -> float:
    return float(json.loads((run / "scan/finished.json").read_text())["seconds"])


def before(part: str, undisturbed: Undisturbed, runs: Path) -> Path:
    """A folder of runs in which there is what an undisturbed one has before a part of its scan."""
    shutil.copytree(undisturbed.run, runs / "tiny", ignore=lambda *_: ("rounds", "final", "result.json", "scan"))
    if part == TOGETHER:
        shutil.copytree(undisturbed.run / "scan" / LEVELS, runs / "tiny/scan" / LEVELS)
    return runs


def scanned(run: Path) -> Any:
    return json.loads((run / "scan/scan.json").read_text())


def measured_twice(run: Path) -> int:
    """Levels that stand twice in what the scan wrote."""
    lines = [json.loads(line) for file in (run / "scan/levels").glob("*/*.jsonl") for line in file.open()]
    keys = [(line["tensor"], line["level"]["density"]) for line in lines if "level" in line]
    return len(keys) - len(set(keys))


@pytest.mark.parametrize("part", [LEVELS, TOGETHER])
def test_the_node_killed_that_measured(
    part: str, undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Line
) -> None:
    """Another one has joined, which has room for one trial only, and not for what would make its inputs again."""
    first = nodes.add()
    run = nodes.run(undisturbed.config, before(part, undisturbed, tmp_path / "runs"), *SETTINGS)
    run.wait(lambda: measured(run.folder, part))
    for pid in processes_in("net", nodes.process.pid, f"ray::{WORDS[part]}"):
        os.kill(pid, signal.SIGSTOP)  # or the scan might be over when the other one has joined
    nodes.add()
    nodes.remove(first)
    reached = measured(run.folder, part)
    run.finish()
    assert reached < (3 * LEVELS_EACH if part == LEVELS else 5 * len(SCAN["together"]))
    assert scanned(run.folder) == scanned(undisturbed.run)
    assert measured_twice(run.folder) == 0
    assert same_weights(undisturbed.run, run.folder)
    what = "the scan" if part == LEVELS else "together"
    line(f"SIGKILL of a node in {what}", "identical", 0, scan_seconds(run.folder) - undisturbed.seconds)


def test_the_only_node_killed(undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Line) -> None:
    """It ends after cluster.wait_seconds with what was asked and what there is, and goes on when a node is back."""
    only = nodes.add()
    runs, settings = before(LEVELS, undisturbed, tmp_path / "runs"), [*SETTINGS, "cluster.wait_seconds=12"]
    run = nodes.run(undisturbed.config, runs, *settings)
    run.wait(lambda: measured(run.folder, LEVELS))
    nodes.remove(only)
    removed = time.monotonic()
    run.finish(code=75)
    assert 12 <= time.monotonic() - removed < 200
    assert (
        "error: scan: waited cluster.wait_seconds=12 for room. a scan trial with 1 CPU each needs 1 CPU" in run.output
    )
    kept = measured(run.folder, LEVELS)
    nodes.add()
    again = nodes.run(undisturbed.config, runs, *settings)
    again.finish()
    assert measured(run.folder, LEVELS) - kept <= 3 * LEVELS_EACH + 1 - kept  # and the line of the dense network
    assert measured_twice(run.folder) == 0
    assert scanned(run.folder) == scanned(undisturbed.run)
    assert same_weights(undisturbed.run, run.folder)
    line("SIGKILL of the only node in the scan", "stops cleanly", 0, None)


@pytest.mark.parametrize("part", [LEVELS, TOGETHER])
def test_a_worker_killed(part: str, undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Line) -> None:
    nodes.add()
    run = nodes.run(undisturbed.config, before(part, undisturbed, tmp_path / "runs"), *SETTINGS)
    run.wait(lambda: measured(run.folder, part))
    [victim, *_] = run.wait(lambda: processes_in("net", nodes.process.pid, f"ray::{WORDS[part]}"))
    os.kill(victim, signal.SIGKILL)
    run.finish()
    assert scanned(run.folder) == scanned(undisturbed.run)
    assert measured_twice(run.folder) == 0
    assert same_weights(undisturbed.run, run.folder)
    what = "the scan" if part == LEVELS else "together"
    line(f"SIGKILL of a worker in {what}", "identical", 0, scan_seconds(run.folder) - undisturbed.seconds)


def test_a_run_without_ray_killed_in_the_scan(undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    """The process that measures is also the one that writes: all that it had written is found."""
    runs = before(LEVELS, undisturbed, tmp_path / "runs")
    command = ["pipeline", "run", str(undisturbed.config), f"runs_dir={runs}", *HEAVY, *SETTINGS]
    killed = Started(tmp_path / "log.txt", [sys.executable, "-m", *command])
    try:
        killed.wait(lambda: measured(runs / "tiny", LEVELS))
    finally:
        killed.kill()
    assert measured(runs / "tiny", LEVELS) < 3 * LEVELS_EACH
    again = program(*command, ray=False)
    assert again.returncode == 0, again.stderr
    assert measured_twice(runs / "tiny") == 0
    assert scanned(runs / "tiny") == scanned(undisturbed.run)
    assert same_weights(undisturbed.run, runs / "tiny")
    line("SIGKILL of a run without Ray in the scan", "identical", 0, None)
