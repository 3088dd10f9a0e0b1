"""Ray jobs: the same command on a cluster."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from cluster import job_env
from cluster.connect import TOKEN, require_shared_paths
from pipeline import storage
from pipeline.base.errors import Away, UserError
from pipeline.base.hiding import hide
from pipeline.cli import commands
from pipeline.cli.messages import INTERRUPTED, Told
from pipeline.rounds import preflight
from pipeline.run import state
from pipeline.run.state import run_root
from pipeline.settings.config import Config

RUN = "secateur"  # metadata of a job: the run that it carries out
PATIENCE_S = 120.0  # how long requests to a cluster that does not answer are retried
_QUIET_S = 120.0  # silence after which a connection counts as lost: a run prints more often
_AGAIN_S = 1.0


def entrypoint(config: str | Path, overrides: list[str], trust_code: bool = False) -> str:
    """The command that the job runs in its working directory."""
    trusted = ["--trust-code"] if trust_code else []
    return shlex.join(["python", "-m", "cluster", "run", str(config), *overrides, *trusted])


def submit(
    config: str,
    overrides: list[str],
    address: str | None,
    wait: bool,
    runtime_env: str | None = None,
    trust_code: bool = False,
) -> int:
    """Submit a run as a job and return the job's exit code (0 at once with wait=False).

    A job that carries out the run already is followed instead. The working directory is the current folder. Raises
    UserError where the config, its paths, the runtime_env or the address will not do.
    """
    path = Path(config)
    if storage.is_local(config) and (path.is_absolute() or ".." in path.parts):
        raise UserError(f"config '{config}' must lie below the current folder, which is sent as the job's working_dir")
    if hide(config) != config:
        raise UserError(
            f"config '{config}' holds a password or signature, which a job's command would show: copy it here"
        )
    require_own_names(Path.cwd())
    loaded = commands.read(config, overrides, trust_code=trust_code)
    require_shared_paths(loaded, "a job's working directory is temporary and the next submission does not see it")
    environment = job_env.make(loaded, runtime_env, Path.cwd())
    where = _where(address)
    client, command, root = _client(where), entrypoint(config, overrides, trust_code), run_root(loaded)
    job = _live_job(client, root, command)
    if job is None:
        check(loaded)
        job = client.submit_job(entrypoint=command, runtime_env=environment, metadata={RUN: root})
        print(f"job {job} submitted; `ray job logs {job}` shows its log, `ray job stop {job}` ends it", flush=True)
    if not wait:
        return 0
    return _followed(client, job, where)


def print_log(job: str, address: str | None, follow: bool) -> int:
    """Print what a job printed; with `follow` to its end, return its exit code. Raises UserError for no such job."""
    where = _where(address)
    client = _client(where)
    if follow:
        return _followed(client, job, where)
    try:
        print(client.get_job_logs(job), end="")
    except RuntimeError as error:
        raise UserError(
            f"--address={where}: the cluster has no log of job {job}: `ray job list` shows its jobs"
        ) from error
    return 0


def _where(address: str | None) -> str:
    """The dashboard's address: as given, that of the environment, or this machine's."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    return given or "http://127.0.0.1:8265"


def _followed(client: Any, job: str, where: str) -> int:
    """Follow a job's log to its end; returns the job's exit code."""
    try:
        return asyncio.run(_follow(client, job, where))
    except KeyboardInterrupt as error:
        print(
            f"no longer following job {job}, which goes on. To follow it again: the same command, or `ray job logs -f "
            f"{job}`. To end it: `ray job stop {job}`",
            file=sys.stderr,
        )
        raise Told(INTERRUPTED) from error


def require_own_names(folder: Path) -> None:
    """Raise UserError where the folder that is sent holds a package with the name of one of ours: it would hide it."""
    for name, part in (("pipeline", "stages.py"), ("cluster", "connect.py")):
        for found in (folder / name, folder / f"{name}.py"):
            is_package = found.is_file() or (found / "__init__.py").is_file()
            if is_package and not (found / part).is_file():
                raise UserError(
                    f"'{found}' is sent with the job, and hides secateur's own package '{name}' there: give yours "
                    "another name"
                )


def check(config: Config) -> None:
    """Check a run before a cluster is asked for it, as far as its files and its network's code can be seen from here.

    A machine that submits may have no way to the stores of the run. Raises UserError for what will not do; the job
    itself checks the rest.
    """
    preflight.check_names(config)
    files = (config.data.root, config.data.class_index, config.model.checkpoint)
    missing = [file for file in files if file is not None and storage.is_local(file) and not Path(file).exists()]
    code = config.model.factory.replace(":", ".").partition(".")[0]
    if code != config.model.factory and importlib.util.find_spec(code) is None:
        missing.append(f"model.factory={config.model.factory}")
    source = None if config.start.source is None else state.source_root(config.start, config.runs_dir)
    try:
        if source is not None and not storage.exists(storage.join(source, "run.json")):
            missing.append(f"start.from={config.start.source}")
        if not missing:
            preflight.check(config)
    except (Away, storage.NoAccess) as error:
        print(f"cannot be seen from this machine: {error}; the network is checked by the job", flush=True)
    if missing:
        print(f"not on this machine: {', '.join(missing)}; the network is checked by the job", flush=True)


def _client(where: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # tells of every connection
    try:
        client = JobSubmissionClient(where)
        client.list_jobs()  # the version, which Ray looks at first, is told to anybody
        return client
    except AuthenticationError as error:
        raise UserError(
            f"--address={where}: the cluster does not take this token, or wants one and got none: {TOKEN}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise Away(
            f"--address={where}: no Ray dashboard answers there ({str(error).splitlines()[0]}); start a cluster with "
            "`ray start --head`, or give its dashboard's address"
        ) from error


def _live_job(client: Any, root: str, command: str) -> str | None:
    """The job that carries out a run at this moment."""
    for job in client.list_jobs():
        if not job.status.is_terminal() and (job.metadata or {}).get(RUN) == root:
            print(f"run '{root}' is being carried out by job {job.submission_id}: following it", flush=True)
            if job.entrypoint != command:
                print(f"it was submitted with other settings, which stay: {job.entrypoint}", flush=True)
            return str(job.submission_id)
    return None


async def _follow(client: Any, job: str, where: str) -> int:
    """Print a job's log to its end, over as many connections as it takes; returns the job's exit code."""
    printed, heard, told = 0, time.monotonic(), False
    while True:
        before = printed
        printed, whole = await _tail(client, job, printed)
        if printed > before:  # it answered until now, however long the connection held
            heard, told = time.monotonic(), False
        info = _info(client, job)
        if info is not None and info.status.is_terminal():
            if not whole:
                print(_rest(client, job, printed), end="", flush=True)
            return _end(info, job)
        if info is not None:
            heard, told = time.monotonic(), False
        elif time.monotonic() - heard > PATIENCE_S:
            raise Away(
                f"--address={where} has not answered for {PATIENCE_S:.0f} s; job {job} may still run. When the cluster "
                "is back, the same command follows it, or resumes the run"
            )
        elif not told:
            told = True
            print(f"connection to {where} lost; trying again for {PATIENCE_S:.0f} s", file=sys.stderr, flush=True)
        await asyncio.sleep(_AGAIN_S)


async def _tail(client: Any, job: str, printed: int) -> tuple[int, bool]:
    """Print the log beyond its first `printed` characters; returns how many there were, and whether that is all."""
    import aiohttp

    seen = 0
    stream = aiter(client.tail_job_logs(job))
    try:
        while True:
            text = await asyncio.wait_for(anext(stream), _QUIET_S)
            print(text[max(0, printed - seen) :], end="", flush=True)
            seen += len(text)
            printed = max(printed, seen)
    except StopAsyncIteration:
        return printed, True
    except (OSError, RuntimeError, aiohttp.ClientError):
        return printed, False


def _rest(client: Any, job: str, printed: int) -> str:
    """The log of a job that has ended, beyond what was printed."""
    try:
        return str(client.get_job_logs(job))[printed:]
    except (OSError, RuntimeError) as error:
        return f"the end of the log of job {job} cannot be read: {error}\n"


def _info(client: Any, job: str) -> Any:
    """What the cluster says of a job, or None where it does not answer. Raises UserError if it knows no such job."""
    try:
        return client.get_job_info(job)
    except OSError:
        return None
    except RuntimeError as error:
        if "404" in str(error):
            raise Away(
                f"the cluster does not know job {job} any more: it was started anew; the same command resumes the run"
            ) from error
        return None


def _end(info: Any, job: str) -> int:
    if str(info.status) == "STOPPED":
        print(f"job {job} was stopped; the same command resumes the run")
        return INTERRUPTED
    code = info.driver_exit_code
    if code is None:
        code = 0 if str(info.status) == "SUCCEEDED" else 1
    if code:
        said = str(info.message).partition(", last available logs")[0]  # which were shown
        print(f"job {job} ended with {info.status}: {said}")
    return int(code)
