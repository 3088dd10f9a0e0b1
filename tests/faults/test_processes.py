"""SIGKILL of workers and of the driver, wherever it hurts: the final weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from faults.gated import FACTORY, Gate
from faults.moments import MOMENTS
from faults.runs import EVERY, Line, RayRun, copy_before_rounds, newest_step, resumed_at, same_weights
from tiny_run import NO_SCAN, TINY, merged

pytestmark = [pytest.mark.ray, pytest.mark.faults]


@dataclass(frozen=True)
class Undisturbed:
    """A run of the same settings that nothing happened to."""

    config: Path
    run: Path
    seconds: float  # of the whole run
    rounds_seconds: float  # of a run that begins with its rounds
    step_seconds: float  # of one update in a round


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(merged(TINY, {"runs_dir": str(root / "runs"), "model.factory": FACTORY})))
    seconds = RayRun(config, root / "runs").finish()
    run = root / "runs/tiny"
    rounds_seconds = RayRun(config, copy_before_rounds(run, root / "again")).finish()
    assert same_weights(run, root / "again/tiny")
    metrics = json.loads((run / "rounds/01/metrics.json").read_text())
    step_seconds = sum(epoch["seconds"] for epoch in metrics["history"]) / metrics["steps"]
    return Undisturbed(config, run, seconds, rounds_seconds, step_seconds)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_a_step(rank: int, undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    run = RayRun(undisturbed.config, copy_before_rounds(undisturbed.run, tmp_path))
    victim, steps = run.worker(rank), run.folder / "rounds/01/steps"
    run.wait(lambda: newest_step(steps))
    time.sleep(20 * undisturbed.step_seconds)
    saved = newest_step(steps)
    os.kill(victim, signal.SIGKILL)
    since = time.time() - (steps / f"{saved:08d}/manifest.json").stat().st_mtime
    seconds = run.finish()
    assert resumed_at(run.output) >= (saved or 0) > 0, run.output
    assert same_weights(undisturbed.run, run.folder)
    repeated = round(since / undisturbed.step_seconds)
    line(f"SIGKILL of rank {rank} in a step", "identical", repeated, seconds - undisturbed.rounds_seconds)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_evaluation(rank: int, undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    """Both ranks are held in the first evaluation after the plan of a round."""
    runs, gate = copy_before_rounds(undisturbed.run, tmp_path), Gate(tmp_path / "gate")
    gate.close("eval", runs, "tiny/rounds/01/plan.json")
    run = RayRun(undisturbed.config, runs, **gate.environment)
    victim = run.worker(rank)
    run.wait(lambda: victim in gate.held())
    os.kill(victim, signal.SIGKILL)
    gate.open()
    seconds = run.finish()
    assert run.output.count(" weights kept (") == 1  # what the evaluation says; the first try did not come to it
    assert resumed_at(run.output) == 0
    assert same_weights(undisturbed.run, run.folder)
    line(f"SIGKILL of rank {rank} in evaluation", "identical", 0, seconds - undisturbed.rounds_seconds)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_killed_in_a_checkpoint(rank: int, undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    run = RayRun(undisturbed.config, copy_before_rounds(undisturbed.run, tmp_path))
    step = run.kill_in_a_checkpoint(rank)
    seconds = run.finish()
    assert same_weights(undisturbed.run, run.folder)
    # Rank 0 may still have completed it where the other was killed.
    resumed = resumed_at(run.output)
    assert resumed < step if rank == 0 else resumed <= step, run.output
    line(f"SIGKILL of rank {rank} in a checkpoint", "identical", step - resumed, seconds - undisturbed.rounds_seconds)


def test_the_driver_killed_in_an_attempt_that_is_undone(tmp_path: Path, line: Line) -> None:
    """A campaign whose first step, to 0.1% of the weights, cannot be accepted."""
    campaign = [
        NO_SCAN, "prune.dense_control=false", "dense.epochs=5", "retrain.epochs=10", "target.mode=no-loss",
        "target.compression=null", "target.step=0.001", "target.confidence=0.5", "target.tolerance=0.2",
        "target.max_rounds=1",
    ]  # fmt: skip
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    undisturbed = RayRun(config, tmp_path / "undisturbed", *campaign)
    expected = undisturbed.finish()
    runs = tmp_path / "killed"
    first = RayRun(config, runs, *campaign)
    first.wait(lambda: newest_step(first.folder / "rounds/01/steps"))
    saved = newest_step(first.folder / "rounds/01/steps") or 0
    assert not (first.folder / "rounds/01/attempt-1").exists()
    first.kill()
    spent = time.monotonic() - first.started
    again = RayRun(config, runs, *campaign)
    seconds = spent + again.finish()
    assert "rounds/01 at density 0.10% is undone" in again.output
    assert resumed_at(again.output) >= saved > 0  # one more may have come before the kill
    assert same_weights(undisturbed.folder, again.folder)
    records = [
        [(row["round"], row["attempt"], row["density"], row["accepted"], row["val_top1"]) for row in result["rounds"]]
        for result in (json.loads((run.folder / "result.json").read_text()) for run in (undisturbed, again))
    ]
    assert records[0] == records[1]
    line("SIGKILL in an undone attempt", "identical", f"<={EVERY}", seconds - expected)


STAGES: dict[str, tuple[bool, Callable[[Path], object]]] = {
    # stage: does the run begin with its rounds, and what says that it is in the middle of the stage
    "shards": (False, lambda run: any((run / "shards").glob("*")) and not (run / "shards/manifest.json").exists()),
    "dense training": (False, lambda run: newest_step(run / "dense/steps")),
    "the scan": (False, MOMENTS["scan"]),
    "a round": (True, lambda run: newest_step(run / "rounds/01/steps")),
    "the dense control": (True, lambda run: newest_step(run / "rounds/control-01/steps")),
    "the end": (True, lambda run: (run / "rounds/finished.json").exists()),
}
PHASES = {"dense training": "dense", "a round": "rounds/01", "the dense control": "rounds/control-01"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_driver_killed_in_each_stage(stage: str, undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    late, in_the_middle = STAGES[stage]
    runs = copy_before_rounds(undisturbed.run, tmp_path) if late else tmp_path
    first = RayRun(undisturbed.config, runs)
    first.wait(lambda: in_the_middle(first.folder))
    phase = PHASES.get(stage, "")
    saved = newest_step(first.folder / phase / "steps") or 0 if phase else 0
    first.kill()
    spent = time.monotonic() - first.started
    assert not (first.folder / "result.json").exists()
    again = RayRun(undisturbed.config, runs)
    seconds = spent + again.finish()
    assert same_weights(undisturbed.run, again.folder)
    if phase:
        assert resumed_at(again.output, phase) >= saved > 0 or f"{phase}:" not in again.output, again.output
    lost = seconds - (undisturbed.rounds_seconds if late else undisturbed.seconds)
    line(f"SIGKILL of the driver in {stage}", "identical", f"<={EVERY}" if phase else 0, lost)


@pytest.mark.parametrize("what", ["checkpoint", "snapshot"])
def test_a_torn_file_of_a_killed_run(what: str, undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    runs = copy_before_rounds(undisturbed.run, tmp_path)
    first = RayRun(undisturbed.config, runs)
    steps = first.folder / "rounds/01/steps"
    first.wait(lambda: (newest_step(steps) or 0) >= 100)
    first.kill()
    spent = time.monotonic() - first.started
    time.sleep(3)  # what Ray left of the workers ends
    saved = newest_step(steps)
    assert saved is not None
    if what == "checkpoint":
        torn = steps / f"{saved:08d}/weights.safetensors"
        torn.write_bytes(torn.read_bytes()[:-100])
    else:
        # Ray is told of no checkpoint, so it writes no snapshot of its own; where it would, there is a torn one.
        assert not list(first.folder.glob("ray/**/checkpoint_manager_snapshot.json"))
        left = [folder for folder in (first.folder / "ray").iterdir() if folder.is_dir()]
        assert left
        for folder in left:
            (folder / "checkpoint_manager_snapshot.json").write_text('{"ver')
    again = RayRun(undisturbed.config, runs)
    seconds = spent + again.finish()
    assert same_weights(undisturbed.run, again.folder)
    if what == "checkpoint":
        assert f"{saved:08d}' is torn: weights.safetensors" in again.output, again.output
        assert resumed_at(again.output) == saved - EVERY
    else:
        assert resumed_at(again.output) == saved
        assert not any((again.folder / "ray").iterdir())
    line(f"torn {what}", "identical", saved - resumed_at(again.output), seconds - undisturbed.rounds_seconds)
