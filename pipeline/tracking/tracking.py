"""MLflow: makes a tracking server hold what a run's folder says. No other package knows MLflow.

The run's folder is the truth. `sync` may be called at any time and any number of times, also after a crash in its
middle. Runs are found by tag before they are made, metric points carry times taken from the run, and a tag lists the
files that are there already. mlflow is imported inside functions, since the import takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.hiding import hide
from pipeline.run.contents import read
from pipeline.run.result import MlflowPlace
from pipeline.settings.config import Config
from pipeline.tracking import models, records, store
from pipeline.tracking.records import MlflowRun
from pipeline.tracking.server import Server, reason, refusal

_UNKNOWN = ("NOT_IMPLEMENTED", "FEATURE_DISABLED")  # what a store says of a request that it never takes


@dataclass(frozen=True)
class Synced:
    """Where the run now stands in MLflow. The URI is without any user name and password."""

    tracking_uri: str
    run_id: str
    experiment_id: str
    lacks: str = ""  # why it does not hold the run's networks, where it holds all else

    @property
    def place(self) -> MlflowPlace:
        """What result.json says of it."""
        return MlflowPlace(tracking_uri=self.tracking_uri, run_id=self.run_id)


def sync(run_dir: str | Path, config: Config) -> Synced:
    """Make MLflow hold all that the run directory holds; idempotent.

    Raises UserError if the directory is not a run or the server refuses, and Away if the server does not answer.
    """
    contents = read(run_dir)
    server = Server(config.tracking, config.runs_dir)
    uri, client = server.uri, server.client()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        experiment = server.experiment(client)
        known = store.known(client, experiment, contents.run.uid)
        whole = records.parent(contents, config)
        run_id = store.put(client, experiment, whole, known, store.parent_run(client, experiment, contents.start))
        above = {"mlflow.parentRunId": run_id}
        rounds = [records.child(contents, each, config, whole.points) for each in contents.rounds]
        children = [store.put(client, experiment, each, known, above) for each in rounds]
        if {run_id, *children} != {run.info.run_id for run in known}:  # some were made, or are too many
            store.delete_twins(client, store.known(client, experiment, contents.run.uid))
        everything = [*zip(children, rounds, strict=True), (run_id, whole)]
        lacks = _store_models(client, config, everything, {run.info.run_id: run for run in known})
        # Last: a parent that says FINISHED has all its rounds, and its model.
        store.set_status(client, client.get_run(run_id), whole)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise refusal(uri, error, "did not take the run") from error
    return Synced(hide(uri), run_id, experiment, lacks)


def _store_models(client: Any, config: Config, runs: Sequence[tuple[str, MlflowRun]], known: Mapping[str, Any]) -> str:
    """Make MLflow hold the networks of these MLflow runs, the parent's last; `known` were there before, by their ids.

    Returns why it does not, where the server knows no models, or refuses them: the rest of the run is there then.
    """
    from mlflow.exceptions import MlflowException

    parent, whole = runs[-1]
    data = {each.split: each for each in whole.data}
    for run_id, record in runs:
        if record.model is not None:
            register = config.tracking.register if run_id == parent else None
            try:
                run = known.get(run_id) or client.get_run(run_id)
                models.store(client, run, parent, record.model, data, register)
            except MlflowException as error:
                if error.get_http_status_code() >= 500 and error.error_code not in _UNKNOWN:
                    raise
                return f"MLflow did not take the model '{record.model.name}': {reason(error)}"
    return ""
