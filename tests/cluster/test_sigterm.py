"""SIGTERM, which a cancelled job gets: a run ends as Ctrl-C ends it, and a second one does not disturb that."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from faults.moments import measured
from faults.runs import Started, check_stopped
from support import alone_on_the_network
from tiny_run import ALONE, TINY, merged
from tracking_server import everything, named

from pipeline import stages, storage
from pipeline.cli import commands
from pipeline.local import LocalEngine
from pipeline.run.events import unheard
from pipeline.run.state import open_run
from pipeline.scan.known import LEVELS
from pipeline.settings.config import Config
from pipeline.tracking import tracking
from pipeline.train.world import configure_process


def written(folder: Path, **changes: object) -> tuple[Path, Config]:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged({**TINY, "runs_dir": str(folder / "runs")}, changes)))
    return path, commands.load(path, None)


def stop(run: Started) -> None:
    """Two signals, the second while the run is ending."""
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(0.3)
    os.kill(run.process.pid, signal.SIGTERM)


def test_without_ray_on_s3_the_lease_is_given_back_and_mlflow_is_told(s3: str, tmp_path: Path) -> None:
    """While shards are written; MLflow is only being imported then."""
    path, config = written(
        tmp_path,
        **{
            "runs_dir": f"{s3}/runs",
            "data.shard_samples": 2,
            "tracking.enabled": True,
            "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        },
    )
    run = Started(tmp_path / "log.txt", [sys.executable, "-m", "pipeline", "run", str(path)])
    try:
        run.wait(lambda: "shards: shard train-" in run.output)
        stop(run)
        run.finish(130)
    finally:
        run.kill()
    check_stopped(run.output, f"python -m pipeline run {path}")
    folder = f"{s3}/runs/tiny"
    assert storage.read_json(f"{folder}/lease.json")["released"]
    assert storage.exists(f"{folder}/shards/manifest.partial.json")
    assert not storage.exists(f"{folder}/data.json")
    held = everything(config)
    assert named(held)["tiny"]["info"][1] == "KILLED"
    tracking.sync(folder, config)
    assert everything(config) == held


@pytest.mark.ray
def test_in_the_scan_under_ray(tmp_path: Path) -> None:
    """A scan of 300 levels; the dense network was trained before, without Ray."""
    levels = [round(1 - (number + 1) / 101, 4) for number in range(100)]
    path, config = written(tmp_path, **{"dense.epochs": 1, "scan.levels": levels})
    configure_process(config.threads)
    with open_run(config) as here:
        stages.carry_out([stages.SHARDS, stages.DENSE], stages.Driver(config, LocalEngine(ALONE), here, unheard))
    command = [*alone_on_the_network(), sys.executable, "-m", "cluster", "run", str(path)]
    run, folder = Started(tmp_path / "log.txt", command), tmp_path / "runs/tiny"
    try:
        run.wait(lambda: measured(folder, LEVELS))
        stop(run)
        run.finish(130)
    finally:
        run.kill()
    check_stopped(run.output, f"secateur run {path}")
    assert 0 < measured(folder, LEVELS) < 300
    assert not (folder / "scan/scan.json").exists()
    with open_run(config):  # the lease was given back
        pass
