"""What is done to a finished run is done to one on S3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch

from pipeline import stages, storage
from pipeline.local import LocalEngine
from pipeline.run.events import unheard
from pipeline.settings.config import Config
from pipeline.train.world import World

pytestmark = pytest.mark.faults


def test_report_bench_and_sync_take_a_url(
    s3: str, tiny: Callable[..., Config], secateur: Callable[..., str], tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = tiny(**{"runs_dir": f"{s3}/runs", "tracking.enabled": True, "tracking.uri": uri})
    place = stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), unheard).mlflow
    assert place is not None
    run = f"{s3}/runs/tiny"
    storage.remove(f"{run}/report.html")
    assert secateur("report", run).strip() == f"{run}/report.html"
    assert b"<html" in storage.read_bytes(f"{run}/report.html")
    assert "median latency" in secateur("bench", run, "--repeats=5")
    assert storage.read_json(f"{run}/result.json")["latency_ms"]["batch"] == 1
    assert {"model.onnx", "compact.safetensors"} <= set(storage.list_files(f"{run}/final"))
    assert secateur("sync", run).split()[-1] == place.run_id
    found = mlflow.MlflowClient(uri).get_run(place.run_id)
    assert found.info.status == "FINISHED"
    files = {item.path for item in mlflow.MlflowClient(uri).list_artifacts(found.info.run_id, "final")}
    assert {"final/compact.onnx", "final/compact.safetensors", "final/model.packed"} <= files
    (model,) = [
        each
        for each in mlflow.MlflowClient(uri).search_logged_models([found.info.experiment_id])
        if each.source_run_id == place.run_id
    ]
    mlflow.artifacts.download_artifacts(f"{model.artifact_location}/model.onnx", dst_path=str(tmp_path / "there"))
    assert (tmp_path / "there/model.onnx").read_bytes() == storage.read_bytes(f"{run}/final/model.onnx")
