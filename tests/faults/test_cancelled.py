"""SIGTERM in every stage, alone and as a job that is stopped: the run ends as Ctrl-C ends it, and goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.moments import MOMENTS, OVER, begun
from faults.runs import Line, Started, check_stopped, same_weights
from head import DASHBOARD, Head, answering_head
from support import ROOT, alone_on_the_network, program
from tiny_run import TINY, merged
from tracking_server import everything, named

from pipeline.cli import commands
from pipeline.run.state import config_of, open_run
from pipeline.settings.config import Config
from pipeline.tracking import tracking

pytestmark = [pytest.mark.ray, pytest.mark.faults]

EVERY = 20  # steps between checkpoints
# Large images, so a network of a million weights, and many shards and levels: each stage lasts for a second or more.
SETTINGS: dict[str, Any] = {
    "data.shard_samples": 8, "data.resize": 56, "data.size": 56, "model.kwargs.inputs": 56 * 56,
    "dense.epochs": 6, "dense.checkpoint_steps": EVERY, "scan.levels": [round(1 - n / 30, 4) for n in range(1, 30)],
    "scan.together": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], "prune.allocation": "budget", "prune.rounds": 1,
    "prune.dense_control": False, "retrain.epochs": 6, "retrain.checkpoint_steps": EVERY, "tracking.enabled": True,
}  # fmt: skip
TRAININGS = ("dense", "rounds")
GO_ON_ON_RAY = ("scan", "rounds")  # the others go on without it, to the same bits and in half the time


def config_in(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged({**TINY, "runs_dir": str(folder / "runs")}, SETTINGS)))
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that nothing happened to; one worker of Ray's gives the bits that this process gives."""
    path = config_in(tmp_path_factory.mktemp("undisturbed"))
    done = program("pipeline", "run", str(path), ray=False)
    assert done.returncode == 0, done.stderr
    return path.parent / "runs/tiny"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    """A Ray head for all jobs."""
    with answering_head() as started:
        yield started


@pytest.mark.parametrize("stage", MOMENTS)
def test_alone(stage: str, undisturbed: Path, tmp_path: Path, line: Line) -> None:
    path, run = config_in(tmp_path), begun(stage, undisturbed, tmp_path / "runs")
    command = [*alone_on_the_network(), sys.executable, "-m", "cluster", "run", str(path)]
    started = Started(tmp_path / "log.txt", command)
    took = terminated(started, lambda: MOMENTS[stage](run))
    kept(stage, started.output, path, run)
    with_ray = stage in GO_ON_ON_RAY
    again = program("cluster" if with_ray else "pipeline", "run", str(path), ray=with_ray)
    assert again.returncode == 0, again.stdout + again.stderr
    assert same_weights(undisturbed, run)
    line(f"SIGTERM in {stage}", "identical", repeated(stage), took)


@pytest.mark.parametrize("stage", MOMENTS)
def test_as_a_job(stage: str, cluster: Head, undisturbed: Path, tmp_path: Path, line: Line) -> None:
    path, run = config_in(tmp_path), begun(stage, undisturbed, tmp_path / "runs")

    def job(*args: str) -> tuple[str, dict[str, Any]]:
        script = [sys.executable, str(ROOT / "tests/faults/stop_job.py"), DASHBOARD, str(path), str(run), *args]
        done = cluster.run(*script, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        assert done.returncode == 0, done.stdout + done.stderr
        log, _, end = done.stdout.rstrip().rpartition("\n")
        return log, json.loads(end)

    log, end = job(stage)
    assert end["status"] == "STOPPED", log
    assert "ended with 130" in log, log
    kept(stage, log, path, run)
    if stage in GO_ON_ON_RAY:
        again, last = job()
        assert last["status"] == "SUCCEEDED", again
        assert "ended with 0" in again, again
    else:
        done = program("pipeline", "run", str(path), ray=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(undisturbed, run)
    line(f"job stopped in {stage}", "identical", repeated(stage), end["seconds"])


@pytest.mark.parametrize("name", ["scan", "reproduce", "bench"])
def test_another_command_that_holds_a_lease(name: str, undisturbed: Path, tmp_path: Path, line: Line) -> None:
    path, runs = config_in(tmp_path), tmp_path / "runs"
    if name == "scan":
        run = begun("scan", undisturbed, runs)
        args, moment, over = ["scan", str(path)], MOMENTS["scan"], OVER["scan"]
    elif name == "reproduce":
        run = runs / "reproduce/lenet-300-100/seed-0"
        path.rename(tmp_path / "lenet-300-100.yaml")
        args = ["reproduce", "lenet-300-100", "data.source=digits", "dense.epochs=1", f"--configs={tmp_path}"]
        moment, over = MOMENTS["scan"], OVER["scan"]
    else:
        run = Path(shutil.copytree(undisturbed, runs / "tiny"))
        args, over = ["bench", str(run), "--repeats=1000"], "final/latency.json"

        def moment(run: Path) -> bool:
            return (run / "final/compact.safetensors").exists()

    prefix = alone_on_the_network()
    started = Started(tmp_path / "log.txt", [*prefix, sys.executable, "-m", "cluster", *args])
    took = terminated(started, lambda: moment(run))
    check_stopped(started.output, f"secateur {shlex.join(args)}")
    assert not (run / over).exists()
    with open_run(config_of(run)):
        pass
    line(f"SIGTERM in `{name}`", "stops cleanly", 0, took)


@pytest.mark.parametrize("stage", ["shards", "dense"])
def test_under_torchrun(stage: str, undisturbed: Path, tmp_path: Path, line: Line) -> None:
    """torchrun hands it on, and says in its own way that it was ended."""
    path, run = config_in(tmp_path), begun(stage, undisturbed, tmp_path / "runs")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline", "run", str(path)]
    started = Started(tmp_path / "log.txt", [*alone_on_the_network(), sys.executable, *torchrun])
    took = terminated(started, lambda: MOMENTS[stage](run), code=1)
    assert started.output.count(f"To go on: python -m pipeline run {path}") == 2, started.output  # of each rank
    assert "[rank" not in started.output, started.output
    assert not (run / OVER[stage]).exists()
    with open_run(commands.load(path, None)):
        pass
    line(f"SIGTERM of torchrun in {stage}", "stops cleanly", 0, took)


def terminated(started: Started, ready: Callable[[], object], code: int = 130) -> float:
    """Send SIGTERM when it is time, and again while the run ends; check the exit code, and return the seconds."""
    try:
        started.wait(ready)
        since = time.monotonic()
        started.stop()
        started.finish(code)
    finally:
        started.kill()
    return time.monotonic() - since


def kept(stage: str, output: str, path: Path, run: Path) -> None:
    """Check what is left of a run that was stopped in a stage: messages, state, lease, MLflow's record."""
    check_stopped(output, f"secateur run {path}")
    assert MOMENTS[stage](run) or stage == "joining Ray"
    assert not (run / OVER[stage]).exists(), output
    config = commands.load(path, None)
    state = same_as_mlflow(config, run)
    assert state == ("FINISHED" if stage == "report" else "KILLED")
    with open_run(config):  # the lease was given back
        pass
    print(f"{stage}: lease free, MLflow holds all of it ({state})")


def same_as_mlflow(config: Config, run: Path) -> str:
    """Check that MLflow holds all that a run's folder holds; returns the state that it says the run is in."""
    held = everything(config)
    tracking.sync(run, config)
    assert everything(config) == held
    return str(named(held)["tiny"]["info"][1])


def repeated(stage: str) -> int | str:
    return f"<={EVERY}" if stage in TRAININGS else 0
