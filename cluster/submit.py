"""Ray jobs: the same command on a cluster."""

from __future__ import annotations

import asyncio
import os
import shlex
from pathlib import Path
from typing import Any

from cluster.connect import require_shared_paths
from pipeline import config as settings
from pipeline.data import storage
from pipeline.errors import UserError

# What a job does not need from the working directory: data, runs, and what tools leave behind.
EXCLUDES = [
    "runs", ".env", ".venv", ".git", "*.tar", "*.db", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
]  # fmt: skip


def entrypoint(config: str | Path, overrides: list[str]) -> str:
    """The command that the job runs in its working directory."""
    return shlex.join(["python", "-m", "cluster", "run", str(config), *overrides])


def submit(config: str, overrides: list[str], address: str | None, wait: bool) -> int:
    """Submit a run as a job and return the job's exit code (0 at once with wait=False).

    The working directory is the current folder. Raises UserError where the config, its paths or the
    address will not do.
    """
    path = Path(config)
    if storage.is_local(config) and (path.is_absolute() or ".." in path.parts):
        raise UserError(f"config '{config}' must lie below the current folder, which is sent as the job's working_dir")
    if storage.hide(config) != config:
        raise UserError(
            f"config '{config}' holds a password or signature, which a job's command would show: copy it here"
        )
    loaded = settings.load(config, overrides)
    require_shared_paths(loaded, "a job's working directory is temporary and the next submission does not see it")
    client = _client(address)
    job = client.submit_job(
        entrypoint=entrypoint(config, overrides),
        runtime_env={"working_dir": os.getcwd(), "excludes": EXCLUDES},
        metadata={"secateur": loaded.name},
    )
    print(f"job {job} submitted; `ray job logs {job}` shows its log, `ray job stop {job}` ends it", flush=True)
    return asyncio.run(_follow(client, job)) if wait else 0


def _client(address: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    where = where or "http://127.0.0.1:8265"
    try:
        return JobSubmissionClient(where)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--address={where}: no Ray dashboard answers there ({str(error).splitlines()[0]}); start a cluster with "
            "`ray start --head`, or give its dashboard's address"
        ) from error


async def _follow(client: Any, job: str) -> int:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)
    status = client.get_job_info(job)
    code = status.driver_exit_code
    if code is None:
        code = 0 if str(status.status) == "SUCCEEDED" else 1
    if code:
        print(f"job {job} ended with {status.status}: {status.message}")
    return int(code)
