"""Nodes that come and go under a training: it goes on from its last checkpoint, with the same samples in each step."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.nodes import Nodes
from faults.runs import RayRun, newest_step
from tiny_run import TINY

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(400)]
ROUND = "rounds/01"
# Only the rounds are long, and the dense training is taken from the undisturbed run.
SETTINGS = [
    "prune.allocation=uniform", "prune.dense_control=false", "dense.epochs=3", "retrain.epochs=60",
    "cluster.workers=[1,2]", "cluster.resize_seconds=3",
]  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """A run on two nodes that nothing happened to."""

    config: Path
    run: Path
    seconds: float  # of its rounds

    def copy(self, to: Path) -> Path:
        """A folder of runs in which this run has everything but its rounds."""
        shutil.copytree(self.run, to / "tiny", ignore=shutil.ignore_patterns("rounds", "final", "result.json"))
        return to


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "runs_dir": str(root / "runs")}))
    nodes = Nodes(root)
    try:
        nodes.add()
        nodes.add()
        run = nodes.run(config, root / "runs", *SETTINGS)
        run.finish()
        assert seen_workers(run) == set()
    finally:
        nodes.close()
    return Undisturbed(config, run.folder, rounds_seconds(run))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    made.close()


def rounds_seconds(run: RayRun) -> float:
    """How long the stage of the rounds took."""
    return float(json.loads((run.folder / "result.json").read_text())["seconds"]["rounds"])


def seen_workers(run: RayRun) -> set[tuple[int, int]]:
    """(step, workers) of each resumption of the round."""
    found = re.findall(rf"{ROUND}: resumed at step (\d+) of \d+(?: on (\d+) workers)?", run.output)
    return {(int(step), int(workers or 1)) for step, workers in found}


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
    """Wait for the second checkpoint of the round, and return its step."""
    steps = run.folder / ROUND / "steps"
    return int(run.wait(lambda: (newest_step(steps) or 0) > 60 and newest_step(steps)))


def test_a_node_removed(undisturbed: Undisturbed, nodes: Nodes, tmp_path: Path, line: Callable[..., None]) -> None:
    nodes.add()
    second = nodes.add()
    run = nodes.run(undisturbed.config, undisturbed.copy(tmp_path), *SETTINGS)
    reached = started(run)
    nodes.remove(second)
    run.finish()
    print(run.output)
