"""The tracking server of a run: where it is, its experiment, and what a person is told where it refuses.

mlflow is imported inside functions, since the import takes seconds.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.base.errors import Away, UserError
from pipeline.base.hiding import hide
from pipeline.settings.cluster import Tracking
from pipeline.settings.config import Config

_KIND_TAG, _KIND = "mlflow.experimentKind", "custom_model_development"  # shows the page of trainings, not of prompts
_REFUSED = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of a user who may write there, and name the server as "
    "its --allowed-hosts does"
)
# Set only where the user has not: a server that is away is noticed in seconds, a request that hangs is given up after
# 30 s and tried twice more, no usage statistics are sent out of the cluster, and none of mlflow's own lines are among
# ours.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@dataclass(frozen=True)
class Server:
    """The tracking server of the settings, or the sqlite file under `runs_dir` that stands in for it."""

    settings: Tracking
    runs_dir: str

    @property
    def uri(self) -> str:
        """The server's address. Raises UserError where there is none, and `runs_dir` cannot hold the file."""
        if self.settings.uri is None and not storage.is_local(self.runs_dir):
            raise UserError(
                f"tracking.uri is not set, and its default, a sqlite file, cannot be in runs_dir={self.runs_dir}: "
                "give the URL of a tracking server"
            )
        return self.settings.uri or f"sqlite:///{self._home / 'mlflow.db'}"

    @property
    def _home(self) -> Path:
        return storage.local_path(self.runs_dir).absolute()

    def client(self) -> Any:
        """An MlflowClient of this server."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        uri = self.uri
        if self.settings.uri is None:
            self._home.mkdir(parents=True, exist_ok=True)
        from mlflow.tracking import MlflowClient

        # "Creating initial MLflow database tables...", and 60 more; "Validating input example..." of each model.
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
            logging.getLogger(name).setLevel(logging.WARNING)
        return MlflowClient(tracking_uri=uri)

    def experiment(self, client: Any) -> str:
        """The experiment's id; made if it is not there, its files beside the sqlite file where that is the store.

        Raises UserError where it is deleted.
        """
        from mlflow.exceptions import MlflowException

        name = self.settings.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            place = (self._home / "mlartifacts").as_uri() if self.settings.uri is None else None
            try:
                return str(client.create_experiment(name, artifact_location=place, tags={_KIND_TAG: _KIND}))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # another run was faster
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"tracking.experiment='{name}' is deleted in MLflow: restore it there, or give another "
                "tracking.experiment"
            )
        if _KIND_TAG not in found.tags:
            client.set_experiment_tag(found.experiment_id, _KIND_TAG, _KIND)
        return str(found.experiment_id)


def look(config: Config) -> str:
    """Ask the tracking server of a config for its experiment; where the server is. Makes nothing.

    Raises UserError where it refuses, and Away where it does not answer.
    """
    server = Server(config.tracking, config.runs_dir)
    uri, client = server.uri, server.client()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client.get_experiment_by_name(config.tracking.experiment)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise refusal(uri, error, "does not answer") from error
    return hide(uri)


def refusal(uri: str, error: Exception, what: str) -> UserError:
    """What a person is told of an error of MLflow's; Away where it may pass."""
    ask = getattr(error, "get_http_status_code", None)
    status = 503 if ask is None else ask()
    remedy = f" ({_REFUSED})" if status in (401, 403) else ""
    return (Away if status >= 500 else UserError)(f"tracking.uri='{hide(uri)}' {what}: {reason(error)}{remedy}")


def reason(error: Exception) -> str:
    return " ".join(hide(str(error)).split())[:300]
