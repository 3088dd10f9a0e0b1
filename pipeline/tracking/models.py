"""Networks of a run as models of MLflow 3 (LoggedModels), and in its registry. No pickle: ONNX, or safetensors."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.tracking import loader
from pipeline.tracking.networks import UID, Model
from pipeline.tracking.records import DataSet

_SHA = "mlflow.secateur.onnx"  # of the file that a LoggedModel holds, once it is there (also where it is no ONNX)
_HELD = "mlflow.secateur.model"  # on a run: the digest of its Model, once MLflow holds that wholly
CHAMPION = "champion"


def store(
    client: Any, run: Any, parent: str, model: Model, data: Mapping[str, DataSet], register: str | None = None
) -> None:
    """Make MLflow hold the model, linked with its run and the parent run, and with what was measured of it.

    `data` are the run's data sets by split. `register`: also a version under that name. A LoggedModel of another file
    is left as it is, and a new one made.
    """
    from mlflow.entities import RunTag

    digest = model.digest if register is None else f"{model.digest} {register}"
    if run.data.tags.get(_HELD) == digest:
        return
    run_id, experiment = run.info.run_id, run.info.experiment_id
    logged = _logged(client, experiment, run_id, model) or _make(client, experiment, run_id, model)
    _measured(client, run_id, logged, model, data.get(model.data))
    for each in dict.fromkeys((run_id, parent)):
        _output(client, each, logged, model)
    if register is not None:
        _register(client, run_id, logged, model, register)
    client.log_batch(run_id, tags=[RunTag(_HELD, digest)])


def _logged(client: Any, experiment: str, run_id: str, model: Model) -> Any:
    """The LoggedModel of this file, or None. One whose upload was broken off is removed."""
    found = None
    for each in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        if each.tags.get(UID) != model.tags[UID]:
            continue
        if each.tags.get(_SHA) is None:
            client.delete_logged_model(each.model_id)
        elif each.tags[_SHA] == model.weights.digest:
            found = each
    return found


def _make(client: Any, experiment: str, run_id: str, model: Model) -> Any:
    kind = "onnx" if model.settings is None else "pyfunc"
    logged = client.create_logged_model(
        experiment, name=model.name, source_run_id=run_id, tags=model.tags, params=model.params, model_type=kind
    )
    with tempfile.TemporaryDirectory(prefix="secateur-mlflow-") as scratch:
        folder = Path(scratch) / "model"
        _save(model, logged, run_id, Path(scratch), folder)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.set_logged_model_tags(logged.model_id, {_SHA: model.weights.digest, "mlflow.note.content": model.note})
    return client.finalize_logged_model(logged.model_id, "READY")


def _save(model: Model, logged: Any, run_id: str, scratch: Path, folder: Path) -> None:
    """Write the model as MLflow reads it into a new folder."""
    import numpy as np
    from mlflow.models import Model as Described
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    given = TensorSpec(np.dtype("float32"), (-1, *model.shape), "input")
    got = TensorSpec(np.dtype("float32"), (-1, model.facts.classes), "output")
    shared: dict[str, Any] = {
        "mlflow_model": Described(
            artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id, model_uuid=logged.model_id
        ),
        "signature": ModelSignature(Schema([given]), Schema([got])),
        "input_example": {"input": np.zeros((1, *model.shape), np.float32)},
    }
    file = model.weights.open(scratch)
    if model.settings is None:
        import mlflow.onnx
        import onnx

        mlflow.onnx.save_model(
            onnx.load(str(file)),
            str(folder),
            pip_requirements=_pinned("mlflow", "numpy", "onnx", "onnxruntime"),
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
            **shared,
        )
        return
    import mlflow.pyfunc

    mlflow.pyfunc.save_model(
        str(folder),
        loader_module=loader.MODULE,
        data_path=str(_as_a_run(model, model.settings, file, scratch / "network")),
        # Not secateur itself: what pip would find by its name elsewhere need not be ours.
        pip_requirements=_pinned("mlflow", "numpy", "safetensors", "torch", "torchvision"),
        model_config={loader.TRUST: False},
        **shared,
    )


def _as_a_run(model: Model, settings: str, tensors: Path, folder: Path) -> Path:
    """A folder that is laid out as a run's is, with what it takes to build the network."""
    target = folder / model.weights.path
    target.parent.mkdir(parents=True)
    shutil.copyfile(tensors, target)
    (folder / "config.yaml").write_text(settings, encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(model.facts.to_json()), encoding="utf-8")
    return folder


def _pinned(*packages: str) -> list[str]:
    return [f"{name}=={version(name)}" for name in packages]


def _output(client: Any, run_id: str, logged: Any, model: Model) -> None:
    """Make it an output of a run."""
    from mlflow.entities import LoggedModelOutput

    outputs = client.get_run(run_id).outputs
    if logged.model_id not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, model.step)])


def _measured(client: Any, run_id: str, logged: Any, model: Model, data: DataSet | None) -> None:
    """Link it with what was measured of it, and on which data."""
    from mlflow.entities import Metric

    on = {} if data is None else {"dataset_name": data.name, "dataset_digest": data.digest}
    there = {(metric.key, metric.value, metric.step) for metric in logged.metrics or ()}
    missing = [
        Metric(p.key, p.value, p.when, p.step, model_id=logged.model_id, run_id=run_id, **on)
        for p in model.metrics
        if (p.key, p.value, p.step) not in there
    ]
    if missing:
        client.log_batch(run_id, metrics=missing)


def _register(client: Any, run_id: str, logged: Any, model: Model, name: str) -> None:
    """A version of the registered model, and the alias: champion is the smallest network without loss.

    MLflow itself takes `models:/NAME/latest` for the newest version, and keeps that name from aliases.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    mine = [each for each in versions if each.tags.get(_SHA) == model.weights.digest and each.run_id == run_id]
    tags = {**model.tags, _SHA: model.weights.digest}
    if not mine:
        # Without a server mlflow would look models:/ up where its global settings point.
        served = client.tracking_uri.startswith("http")
        place = f"models:/{logged.model_id}" if served else logged.artifact_location
        mine = [
            client.create_model_version(
                name, place, run_id, tags=tags, description=model.note, model_id=logged.model_id
            )
        ]
    if model.tags["verdict"] != "no loss":
        return
    aliases = client.get_registered_model(name).aliases
    best = next((each for each in versions if str(each.version) == str(aliases.get(CHAMPION))), None)
    if best is None or float(best.tags.get("compression", 0)) < float(model.tags["compression"]):
        client.set_registered_model_alias(name, CHAMPION, mine[0].version)
