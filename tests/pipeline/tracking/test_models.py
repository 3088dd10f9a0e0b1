"""A run's final network as a model of a real MLflow server: loaded from its registry it answers as the report says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import TINY, carry_out, merged
from tracking_server import TrackingServer, client_of

from pipeline.data import loader, shards
from pipeline.run.state import run_root
from pipeline.settings.config import Config, parse_config
from pipeline.task.feed import Feed
from pipeline.tracking import tracking

pytestmark = pytest.mark.slow


def accuracy(model: Any, config: Config) -> float:
    """Of a model as `mlflow.pyfunc` loads it, on the run's test split."""
    root = f"{run_root(config)}/shards"
    test = loader.open_split(config.data, root, shards.load_manifest(root), "test")
    right = samples = 0
    for batch in loader.EvalLoader(test, config.data).batches(0, 1):
        given = Feed.of(config).inputs(batch.images).numpy()
        output = model.predict({"input": given})
        logits = output["output"] if isinstance(output, dict) else np.asarray(output)
        right += int((logits.argmax(1) == batch.labels.numpy()).sum())
        samples += len(given)
    return right / samples


def loaded(name: str, server: str) -> Any:
    """A model of a server's registry, as a user of MLflow loads it; MLflow's global places are then unset again."""
    import mlflow

    try:
        mlflow.set_tracking_uri(server)
        mlflow.set_registry_uri(server)
        return mlflow.pyfunc.load_model(name)
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]
        os.environ.pop("MLFLOW_REGISTRY_URI", None)  # which set_registry_uri leaves behind


def test_a_model_from_the_registry_gives_the_reports_accuracy(tmp_path: Path, tracking_server: TrackingServer) -> None:
    here = {"enabled": True, "uri": tracking_server.uri, "experiment": "models", "register": "small"}
    values = merged(TINY, {"runs_dir": str(tmp_path), "tracking": here, "target.margin": 0.5})
    config = parse_config(values)
    result = carry_out(config)
    assert result["verdict"] == "no loss"
    model = loaded("models:/small@champion", tracking_server.uri)
    assert accuracy(model, config) == pytest.approx(result["test"]["pruned"]["top1"], abs=1e-9)
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["input"]
    assert signature.outputs is not None
    assert model.metadata.load_input_example is not None

    def held() -> Any:
        client = client_of(config)
        run = client.get_run(result["mlflow"]["run_id"])
        (version,) = client.search_model_versions("name = 'small'")
        (output,) = run.outputs.model_outputs
        logged = client.get_logged_model(output.model_id)
        metrics = {metric.key: metric.value for metric in logged.metrics}
        data = {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs}
        return version.version, logged.model_id, str(logged.status), metrics, data, run.data.metrics

    first = held()
    assert first[3]["test/accuracy"] == result["test"]["pruned"]["top1"]
    assert sorted(first[4]) == ["digits (test)", "digits (train)", "digits (val)"]
    assert "READY" in first[2]
    tracking.sync(run_root(config), config)
    assert held() == first
    files = [path for path in tracking_server.home.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]
    assert files == []
