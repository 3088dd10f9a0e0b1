"""The final network as a model of MLflow 3 (a LoggedModel), and in its registry. No pickle: it is an ONNX file."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.tracking.records import UID, Model

_SHA = "mlflow.secateur.onnx"  # of the ONNX file that a LoggedModel holds, once it is there
CHAMPION = "champion"


def store(client: Any, experiment: str, run_id: str, model: Model, register: str | None) -> None:
    """Make MLflow hold the model, linked with its run, and a version of it under the name `register`, if there is one.

    A LoggedModel of another file than the run's is left as it is, and a new one made.
    """
    logged = _logged(client, experiment, run_id, model) or _make(client, experiment, run_id, model)
    _link(client, run_id, logged, model)
    if register is not None:
        _register(client, run_id, logged, model, register)


def _logged(client: Any, experiment: str, run_id: str, model: Model) -> Any:
    """The LoggedModel of this file, or None. One whose upload was broken off is removed."""
    found = None
    for each in client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'"):
        if each.tags.get(UID) != model.tags[UID]:
            continue
        if each.tags.get(_SHA) is None:
            client.delete_logged_model(each.model_id)
        elif each.tags[_SHA] == model.onnx.digest:
            found = each
    return found


def _make(client: Any, experiment: str, run_id: str, model: Model) -> Any:
    import mlflow.onnx
    import numpy as np
    import onnx
    from mlflow.models import Model as Described
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    given = TensorSpec(np.dtype("float32"), (-1, *model.shape), "input")
    got = TensorSpec(np.dtype("float32"), (-1, model.classes), "output")
    logged = client.create_logged_model(
        experiment, name=model.name, source_run_id=run_id, tags=model.tags, params=model.params, model_type="onnx"
    )
    with tempfile.TemporaryDirectory(prefix="secateur-mlflow-") as scratch:
        file = model.onnx.open(Path(scratch))
        folder = Path(scratch) / "model"
        mlflow.onnx.save_model(
            onnx.load(str(file)),
            str(folder),
            mlflow_model=Described(
                artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id,
                model_uuid=logged.model_id,
            ),
            signature=ModelSignature(Schema([given]), Schema([got])),
            input_example={"input": np.zeros((1, *model.shape), np.float32)},
            pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "numpy", "onnx", "onnxruntime")],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )  # fmt: skip
        client.log_model_artifacts(logged.model_id, str(folder))
    client.set_logged_model_tags(logged.model_id, {_SHA: model.onnx.digest, "mlflow.note.content": model.note})
    return client.finalize_logged_model(logged.model_id, "READY")


def _link(client: Any, run_id: str, logged: Any, model: Model) -> None:
    """Make it an output of its run, with the run's figures on test."""
    from mlflow.entities import LoggedModelOutput, Metric

    outputs = client.get_run(run_id).outputs
    if logged.model_id not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, model.step)])
    there = {(metric.key, metric.value, metric.step) for metric in logged.metrics or ()}
    missing = [
        Metric(p.key, p.value, p.when, p.step, model_id=logged.model_id, run_id=run_id)
        for p in model.metrics
        if (p.key, p.value, p.step) not in there
    ]
    if missing:
        client.log_batch(run_id, metrics=missing)


def _register(client: Any, run_id: str, logged: Any, model: Model, name: str) -> None:
    """A version of the registered model, and the alias: champion is the smallest network without loss."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    mine = [each for each in versions if each.tags.get(_SHA) == model.onnx.digest and each.run_id == run_id]
    tags = {**model.tags, _SHA: model.onnx.digest}
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
