"""A run's networks as models of a real MLflow server: loaded from there they answer as the report says."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.proxy import Fault, Proxy
from small import SMALL
from tiny_run import TINY, carry_out, merged
from tracking_server import TrackingServer, client_of

from pipeline.base.errors import UserError
from pipeline.data import loader, shards
from pipeline.run.events import Event, Warned
from pipeline.run.state import run_root
from pipeline.settings.config import Config, parse_config
from pipeline.task.feed import Feed
from pipeline.tracking import tracking
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.server import Server

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waits for MLflow at its end as long as a busy machine takes."""
    monkeypatch.setenv("SECATEUR_MLFLOW_PATIENCE_S", "600")


def accuracy(model: Any, config: Config, split: str = "test") -> float:
    """Of a model as `mlflow.pyfunc` loads it, on a split of the run's data."""
    root = f"{run_root(config)}/shards"
    data = loader.open_split(config.data, root, shards.load_manifest(root), split)
    right = samples = 0
    for batch in loader.EvalLoader(data, config.data).batches(0, 1):
        given = Feed.of(config).inputs(batch.images).numpy()
        output = model.predict({"input": given})
        logits = output["output"] if isinstance(output, dict) else np.asarray(output)
        right += int((logits.argmax(1) == batch.labels.numpy()).sum())
        samples += len(given)
    return right / samples


def loaded(name: str, server: str, **settings: Any) -> Any:
    """A model of a server, as a user of MLflow loads it; MLflow's global places are then unset again."""
    import mlflow

    try:
        mlflow.set_tracking_uri(server)
        mlflow.set_registry_uri(server)
        return mlflow.pyfunc.load_model(name, **settings)
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
    for name in ("models:/small@champion", "models:/small/latest"):
        model = loaded(name, tracking_server.uri)
        assert accuracy(model, config) == pytest.approx(result["test"]["pruned"]["top1"], abs=1e-9)
    signature = model.metadata.signature
    assert signature.inputs.input_names() == ["input"]
    assert signature.outputs is not None
    assert model.metadata.load_input_example is not None

    def held() -> Any:
        client = client_of(config)
        run = client.get_run(result["mlflow"]["run_id"])
        (version,) = client.search_model_versions("name = 'small'")
        outputs = [client.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
        (logged,) = [each for each in outputs if each.name == "tiny-final"]
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


def models_of(config: Config) -> dict[str, Any]:
    """The models of an experiment by name."""
    client = client_of(config)
    experiment = client.get_experiment_by_name(config.tracking.experiment).experiment_id
    found = client.search_logged_models([experiment])
    assert len({each.name for each in found}) == len(found), "two models of one name"
    return {each.name: each for each in found}


def test_each_accepted_round_is_a_model_that_loads(tmp_path: Path, tracking_server: TrackingServer) -> None:
    here = {"enabled": True, "uri": tracking_server.uri, "experiment": "rounds as models"}
    config = parse_config(merged(TINY, {"runs_dir": str(tmp_path), "tracking": here, "name": "tiny.v1.5"}))
    carry_out(config)
    held = models_of(config)
    rounds = {name: each for name, each in held.items() if "-round-" in name}
    assert held.keys() == {"tiny_v1_5-round-1", "tiny_v1_5-round-2", "tiny_v1_5-final"}
    client = client_of(config)
    (parent,) = client.search_runs([client.get_experiment_by_name("rounds as models").experiment_id],
                                   filter_string="tags.`secateur.kind` = 'run'")  # fmt: skip
    assert {output.model_id for output in parent.outputs.model_outputs} == {each.model_id for each in held.values()}
    for number, name in enumerate(sorted(rounds), start=1):
        logged = client.get_logged_model(rounds[name].model_id)
        metrics = json.loads((tmp_path / f"tiny.v1.5/rounds/{number:02d}/metrics.json").read_text())
        told = {metric.key: (metric.value, metric.dataset_name) for metric in logged.metrics}
        assert told["round/val_accuracy"] == (metrics["val"]["top1"], "digits (val)")
        assert told["round/compression"][0] == metrics["compression"]
        assert client.get_run(logged.source_run_id).data.tags["secateur.round"] == str(number)
        model = loaded(f"models:/{logged.model_id}", tracking_server.uri)
        assert accuracy(model, config, "val") == pytest.approx(metrics["val"]["top1"], abs=1e-9)
        assert model.metadata.signature.inputs.input_names() == ["input"]
        assert model.metadata.load_input_example is not None
    before = {name: (each.model_id, each.last_updated_timestamp) for name, each in models_of(config).items()}
    for _ in range(2):
        tracking.sync(run_root(config), config)
    assert {name: (each.model_id, each.last_updated_timestamp) for name, each in models_of(config).items()} == before
    assert not [path for path in tracking_server.home.rglob("*") if path.suffix in (".pkl", ".pt", ".pth")]


@pytest.mark.parametrize("which", ["final", "none"])
def test_fewer_models_where_they_are_not_wanted(which: str, tmp_path: Path) -> None:
    here = {"enabled": True, "models": which}
    config = parse_config(merged(TINY, {"runs_dir": str(tmp_path), "tracking": here, "prune.allocation": "uniform"}))
    carry_out(config)
    assert len(models_of(config)) == {"final": 1, "none": 0}[which]
    assert (tmp_path / "tiny/final/model.onnx").exists() is (which == "final")


def test_a_network_that_is_no_onnx_is_tensors_and_its_export_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"enabled": True, "system_metrics": False}
    config = parse_config(merged(TINY, {"runs_dir": str(tmp_path), "tracking": here, "prune.allocation": "uniform"}))
    events: list[Event] = []
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
        result = carry_out(config, events)
    told = [event.text for event in events if isinstance(event, Warned)]
    (said,) = told
    assert said.startswith("MLflow gets this network as tensors, which only secateur loads, and not as ONNX: ")
    assert said.endswith("onnxscript is not installed; pip install onnx onnxscript onnxruntime")
    (final,) = [each for name, each in models_of(config).items() if "-round-" not in name]
    model = loaded(final.artifact_location, Server(config.tracking, config.runs_dir).uri)
    assert accuracy(model, config) == pytest.approx(result["test"]["pruned"]["top1"], abs=1e-9)
    again: list[Event] = []
    carry_out(config, again)  # though onnxscript is here now
    assert not [event for event in again if isinstance(event, Warned)]
    assert not (tmp_path / "tiny/final/model.onnx").exists()
    why = tmp_path / "tiny/final/no-onnx.json"
    why.write_text(json.dumps({**json.loads(why.read_text()), "torch": "1.0.0"}))  # it was another torch
    carry_out(config)
    assert (tmp_path / "tiny/final/model.onnx").exists()


def test_code_of_a_stranger_is_not_run_by_loading_a_model(tmp_path: Path) -> None:
    here = {"enabled": True, "models": "rounds", "system_metrics": False}
    changes = {"runs_dir": str(tmp_path), "tracking": here, "prune.allocation": "uniform", "prune.rounds": 1, **SMALL}
    config = parse_config(merged(TINY, changes))
    carry_out(config)
    (logged,) = [each for name, each in models_of(config).items() if "-round-" in name]
    server = Server(config.tracking, config.runs_dir).uri
    with pytest.raises(UserError, match=r'give model_config=\{"trust_code": True\} to load_model'):
        loaded(logged.artifact_location, server)
    model = loaded(logged.artifact_location, server, model_config={"trust_code": True})
    metrics = json.loads((tmp_path / "tiny/rounds/01/metrics.json").read_text())
    assert accuracy(model, config, "val") == pytest.approx(metrics["val"]["top1"], abs=1e-9)


def test_a_server_that_knows_no_models_gets_all_else(tmp_path: Path, tracking_server: TrackingServer) -> None:
    config = parse_config(merged(TINY, {"runs_dir": str(tmp_path), "prune.allocation": "uniform"}))
    carry_out(config)
    proxy = Proxy(tracking_server.uri)
    proxy.fault = Fault("refuse", times=-1, method="", path="/logged-models", status=404, code="ENDPOINT_NOT_FOUND")
    asked = {"enabled": True, "uri": proxy.url, "experiment": "an old server"}
    told = parse_config(merged(TINY, {"runs_dir": str(tmp_path), "prune.allocation": "uniform", "tracking": asked}))
    try:
        synced = tracking.sync(run_root(told), told)
        assert re.match(r"MLflow did not take the model 'tiny-round-1': .*404", synced.lacks)
        problems: list[str] = []
        mirror = Mirror(run_root(told), told, problems.append)
        assert mirror.close(600) == synced
        assert problems == [f"{synced.lacks}. The rest of the run is there"]
    finally:
        proxy.close()
    assert client_of(told).get_run(synced.run_id).info.status == "FINISHED"
