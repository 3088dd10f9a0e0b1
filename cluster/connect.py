"""Joining or starting Ray, and refusing early what it could never run."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.config import Config
from pipeline.data import storage
from pipeline.errors import UserError
from pipeline.state import Run

# Read by Ray's processes when they start, so they must be set before Ray is imported.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # or relative paths of a run would break in workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a loss is seen; 2 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours to handle
}


def connect(config: Config) -> Any:
    """Join cluster.address (a job joins its own cluster), or start Ray on this machine; returns the module.

    Raises UserError where no cluster answers, or where it has less than the config asks for.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if not ray.is_initialized():
        address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
        _init(ray, address, config)
    check_resources(ray.cluster_resources(), config)
    return ray


def check_shared(ray: Any, root: str) -> None:
    """Raise UserError if a node does not see the run's folder: its workers could not find data or checkpoints.

    A URL is not asked for: a node that cannot reach it says so itself, and why.
    """
    if not storage.is_local(root):
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    marker = os.path.join(storage.local_path(root), "lease.json")
    look = ray.remote(num_cpus=0)(os.path.isfile)
    seen = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(marker)
        for node in nodes
    ]
    blind = [node["NodeManagerHostname"] for node, sees in zip(nodes, ray.get(seen), strict=True) if not sees]
    if blind:
        raise UserError(
            f"runs_dir: the run's folder '{root}' is not visible on {', '.join(blind)}: put runs_dir on storage that "
            "all nodes share"
        )


def _init(ray: Any, address: str, config: Config) -> None:
    options: dict[str, Any] = {
        "address": address,
        "logging_level": logging.ERROR,
        "log_to_driver": config.cluster.ray_logs,
        "namespace": "secateur",
    }
    if address == "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        # On one's own machine more workers than cores are allowed: they share them.
        options |= {"num_cpus": max(os.cpu_count() or 1, demand(config)["CPU"]), "include_dashboard": False}
    try:
        knock(address)
        ray.init(**options)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cluster.address={address}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
            "`ray start --head`, or leave cluster.address out to run on this machine"
        ) from error


def knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would try for minutes."""
    host, sign, port = address.rpartition(":")
    if sign and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


def demand(config: Config) -> dict[str, float]:
    """CPUs and GPUs that the largest stage reserves."""
    wanted = config.cluster
    return {
        "CPU": max(wanted.workers * wanted.cpus_per_worker, wanted.cpus_per_trial),
        "GPU": max(wanted.workers * wanted.gpus_per_worker, wanted.gpus_per_trial),
    }


def check_resources(available: dict[str, float], config: Config) -> None:
    """Raise UserError naming what was asked and what the cluster has; Ray itself would wait for ever."""
    wanted = config.cluster
    for kind, needed in demand(config).items():
        has = available.get(kind, 0.0)
        if needed > has:
            each = wanted.cpus_per_worker if kind == "CPU" else wanted.gpus_per_worker
            setting = f"cluster.{kind.lower()}s_per_worker"
            raise UserError(
                f"cluster.workers={wanted.workers} with {each:g} {kind} each, or a scan trial, needs {needed:g} "
                f"{kind}, but the cluster has {has:g}: lower cluster.workers or {setting}, or add nodes"
            )


@contextmanager
def ray_folder(run: Run, name: str) -> Iterator[str]:
    """Where Ray keeps its own record of a training or scan while it goes on; thrown away at the end.

    The run's checkpoints are not Ray's, so no other node looks there: for a run on S3 it is a folder of this machine.
    """
    if storage.is_local(run.root):
        folder = run.path("ray")
        gone = os.path.join(folder, name)
        shutil.rmtree(folder, ignore_errors=True)  # what killed drivers left
    else:
        folder = gone = tempfile.mkdtemp(prefix="secateur-ray-")
    try:
        yield folder
    finally:
        shutil.rmtree(gone, ignore_errors=True)


def in_job() -> bool:
    """Whether this process is the driver of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def require_shared_paths(config: Config, reason: str) -> None:
    """Raise UserError if state would land in a folder that the next driver, or another node, does not see."""
    paths = {"runs_dir": config.runs_dir, "data.root": config.data.root, "model.checkpoint": config.model.checkpoint}
    for setting, value in paths.items():
        if value is not None and "://" not in value and not os.path.isabs(value):
            raise UserError(
                f"{setting}={value} is relative, but {reason}: give an absolute path that every node sees, as in "
                f"{setting}=/shared/{os.path.basename(value) or 'runs'}"
            )
    uri = config.tracking.uri
    if config.tracking.enabled and uri and uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise UserError(
            f"tracking.uri={uri} is relative, but {reason}: write sqlite:////absolute/path/mlflow.db, or a server's URL"
        )
