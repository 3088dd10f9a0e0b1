"""SIGTERM, which a cancelled job gets: a run ends as Ctrl-C ends it, and a second one does not disturb that."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from faults.runs import Started, check_stopped
from tiny_run import TINY, merged
from tracking_server import everything, named

from pipeline import storage
from pipeline.cli import commands
from pipeline.settings.config import Config
from pipeline.tracking import tracking


def written(folder: Path, **changes: object) -> tuple[Path, Config]:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(merged({**TINY, "runs_dir": str(folder / "runs")}, changes)))
    return path, commands.load(path, None)


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
        run.stop()
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
