"""A real `mlflow server` with users, artifacts through it and one name of its own; and all that such a server holds."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import environment, free_port

from pipeline.settings.config import Config
from pipeline.tracking.server import Server

AUTH = """[mlflow]
default_permission = READ
database_uri = sqlite:///{home}/auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 300
"""


class TrackingServer:
    """Started by `start`, as often as it was killed; what it holds lies in `home`."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.password = secrets.token_hex(16)
        self.user = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": self.password}
        self.process: subprocess.Popen[bytes] | None = None
        (home / "auth.ini").write_text(AUTH.format(home=home))

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--allowed-hosts", "127.0.0.1:*"]
        command += ["--backend-store-uri", f"sqlite:///{self.home}/mlflow.db", "--serve-artifacts"]
        command += ["--artifacts-destination", str(self.home / "files")]
        with open(self.home / "log", "a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.home,
                env=environment(
                    MLFLOW_AUTH_CONFIG_PATH=str(self.home / "auth.ini"), MLFLOW_DISABLE_TELEMETRY="true",
                    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # six processes that nobody asks for anything
                    MLFLOW_AUTH_ADMIN_PASSWORD=self.password, MLFLOW_FLASK_SERVER_SECRET_KEY=secrets.token_hex(16),
                ),
            )  # fmt: skip
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self.process.poll() is None, (self.home / "log").read_text()
            assert time.monotonic() < deadline, (self.home / "log").read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL of all its processes; nothing happens if there are none."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False


def client_of(config: Config) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=Server(config.tracking, config.runs_dir).uri)


def everything(config: Config) -> dict[str, Any]:
    """All that MLflow holds: runs with params, tags, every metric point and every artifact with its size."""
    client = client_of(config)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None, f"{client.tracking_uri} was never told of a run"
    return {run.info.run_id: describe(client, run) for run in client.search_runs([experiment.experiment_id])}


def describe(client: Any, run: Any) -> dict[str, Any]:
    run_id = run.info.run_id

    def files(folder: str | None = None) -> Iterator[tuple[str, int]]:
        for info in client.list_artifacts(run_id, folder):
            if info.is_dir:
                yield from files(info.path)
            else:
                yield info.path, info.file_size

    points = {
        key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, key)]
        for key in run.data.metrics
    }
    info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
    return {"info": info, "params": run.data.params, "tags": run.data.tags, "points": points, "files": dict(files())}


def named(held: dict[str, Any]) -> dict[str, Any]:
    """Runs by the part of their names that stays the same: a run's own name, or "round 2 (attempt 2)"."""

    def part(name: str) -> str:
        first, second, *_ = [*name.split(" · "), ""]
        return second if second.startswith("round ") else first

    return {part(run["info"][0]): run for run in held.values()}


def same_everywhere(held: dict[str, Any]) -> dict[str, Any]:
    """`named`, without what tells one server, and one MLflow run, from another."""
    found = named(held)
    assert len(found) == len(held), "two runs of one name"
    parent = {run_id for run_id, run in held.items() if "mlflow.parentRunId" not in run["tags"]}
    assert len(parent) == 1
    for run_id, run in held.items():
        if note := run["tags"].get("mlflow.note.content"):
            run["tags"]["mlflow.note.content"] = note.replace(run_id, "RUN")
        assert run["tags"].pop("mlflow.parentRunId", None) in {None, *parent}
        for name in ("mlflow.user", "mlflow.experimentId", "secateur.changed_settings"):
            run["tags"].pop(name, None)
        for name in ("tracking.uri", "tracking.experiment"):
            run["params"].pop(name, None)
    return found
