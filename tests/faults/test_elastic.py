"""Nodes that come and go under a training: it goes on from its last checkpoint, with the same samples in each step."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from faults.gated import FACTORY, Gate
from faults.ray_nodes import Nodes
from faults.runs import RayRun, copy_before_rounds, newest_step, seconds_to_resume
from tiny_run import TINY, merged

pytestmark = [pytest.mark.ray, pytest.mark.faults]
ROUND = "rounds/01"
REPEATED = f"<={TINY['retrain']['checkpoint_steps']}"
# Only the rounds are long, and the dense training is taken from the undisturbed run.
SETTINGS = [
    "prune.allocation=uniform", "prune.dense_control=false", "prune.rounds=1", "dense.epochs=3", "retrain.epochs=60",
    "cluster.workers=[1,2]", "cluster.resize_seconds=3",
]  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A run on two nodes that nothing happened to."""

    config: Path
    run: Path
    seconds: float  # of its rounds


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(merged(TINY, {"runs_dir": str(root / "runs"), "model.factory": FACTORY})))
    nodes = Nodes(root)
    try:
        nodes.add()
        nodes.add()
        run = nodes.run(config, root / "runs", *SETTINGS)
        run.finish()
        assert not resumptions(run)
    finally:
        nodes.close()
    return Undisturbed(config, run.folder, rounds_seconds(run))


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """A gate that the workers of nodes see which are made after it."""
    made = Gate(tmp_path / "gate")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def rounds_seconds(run: RayRun) -> float:
    """How long the stage of the rounds took."""
    return float(json.loads((run.folder / "result.json").read_text())["seconds"]["rounds"])


def resumptions(run: RayRun) -> list[tuple[int, int]]:
    """(step, workers) each time that the round was resumed."""
    found = re.findall(rf"{ROUND}: resumed at step (\d+) of \d+(?: on (\d+) workers)?", run.output)
    return [(int(step), int(workers or 1)) for step, workers in found]


def order(run: Path) -> list[str]:
    """For each epoch of the round, a digest of which samples were seen at which step."""
    return [epoch["order"] for epoch in json.loads((run / ROUND / "metrics.json").read_text())["history"]]


def check(undisturbed: Undisturbed, run: Path) -> None:
    """What "continues" promises."""
    assert order(run) == order(undisturbed.run)
    before, after = (json.loads((each / "result.json").read_text()) for each in (undisturbed.run, run))
    assert after["weights_kept"] == before["weights_kept"]
    drop = before["test"]["pruned"]["top1"] - after["test"]["pruned"]["top1"]
    assert abs(drop) < 0.05, (before["test"]["pruned"], after["test"]["pruned"])


def started(run: RayRun) -> int:
    """Wait until the round has a few checkpoints, and return the step of the last."""
    steps = run.folder / ROUND / "steps"
    return int(run.wait(lambda: (newest_step(steps) or 0) > 60 and newest_step(steps)))


def repeated(run: RayRun, resumed: int, reached: int) -> int:
    """Updates made twice, as far as they were seen: up to the last whole epoch, or checkpoint, before it resumed."""
    before = run.output.split(f"{ROUND}: resumed at step {resumed}")[0]
    epochs = before.count(f"{ROUND}: epoch ")
    history = json.loads((run.folder / ROUND / "metrics.json").read_text())["history"]
    return max(reached, history[epochs - 1]["step"] if epochs else 0) - resumed


def test_a_node_removed(undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Callable[..., None]) -> None:
    nodes.add()
    second = nodes.add()
    run = nodes.run(undisturbed.config, copy_before_rounds(undisturbed.run, tmp_path), *SETTINGS)
    reached = started(run)
    nodes.remove(second)
    run.finish()
    [(resumed, workers)] = resumptions(run)
    assert resumed >= reached
    assert workers == 1
    check(undisturbed, run.folder)
    line("a node removed", "continues", repeated(run, resumed, reached), rounds_seconds(run) - undisturbed.seconds)


def test_a_node_drained(undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Callable[..., None]) -> None:
    """A notice that a node will be taken away: its worker moves to a third node before."""
    nodes.add()
    second = nodes.add()
    run = nodes.run(undisturbed.config, copy_before_rounds(undisturbed.run, tmp_path), *SETTINGS, "cluster.workers=2")
    reached = started(run)
    nodes.add()
    nodes.drain(second, 120)
    run.finish()
    [(resumed, workers)] = resumptions(run)
    assert re.search(rf"{ROUND}: step {resumed} of \d+ is saved", run.output)
    assert "a node is about to be taken away" in run.output
    assert resumed >= reached
    assert workers == 2
    check(undisturbed, run.folder)
    line("a node drained", "continues", 0, rounds_seconds(run) - undisturbed.seconds)


def test_a_node_added(
    undisturbed: Undisturbed, gate: Gate, nodes: Nodes, tmp_path: Path, line: Callable[..., None]
) -> None:
    nodes.add()
    run = nodes.run(undisturbed.config, copy_before_rounds(undisturbed.run, tmp_path), *SETTINGS)
    reached = started(run)
    gate.slow(0.2)  # else the training may be over before Ray has seen the node
    nodes.add()
    run.wait(lambda: resumptions(run), poll=0.2)
    gate.open()
    run.finish()
    [(resumed, workers)] = resumptions(run)
    assert resumed >= reached
    assert workers == 2
    check(undisturbed, run.folder)
    line("a node added", "continues", repeated(run, resumed, reached), rounds_seconds(run) - undisturbed.seconds)


@pytest.mark.parametrize("workers", ["2", "[2,3]"])
def test_no_room_any_more(
    workers: str, undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Callable[..., None]
) -> None:
    """It ends after cluster.wait_seconds with what was asked and what there is, and goes on when a node is back."""
    nodes.add()
    second = nodes.add()
    runs = copy_before_rounds(undisturbed.run, tmp_path)
    settings = [*SETTINGS, f"cluster.workers={workers}", "cluster.wait_seconds=12"]
    run = nodes.run(undisturbed.config, runs, *settings)
    reached = started(run)
    nodes.remove(second)
    removed = time.monotonic()
    run.finish(code=75)
    assert 12 <= time.monotonic() - removed < 60
    asked = workers.replace(",", ", ")
    assert "error: rounds: waited cluster.wait_seconds=12 for room." in run.output
    assert f"cluster.workers={asked} with 1 CPU each needs 2 CPU, but the cluster has 1 CPU:" in run.output
    refused = nodes.run(undisturbed.config, runs, *settings)
    refused.finish(code=75)
    assert f"error: cluster.workers={asked} with 1 CPU each needs 2 CPU" in refused.output
    nodes.add()
    again = nodes.run(undisturbed.config, runs, *settings)
    again.finish()
    [(resumed, _)] = resumptions(again)
    assert resumed >= reached
    check(undisturbed, run.folder)
    line(f"a node removed, cluster.workers={asked}", "stops cleanly", REPEATED, seconds_to_resume(again.output))
