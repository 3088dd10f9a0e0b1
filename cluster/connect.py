"""Joining or starting Ray, and refusing early a config that it could never run."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import storage
from pipeline.base.errors import Away, UserError
from pipeline.run.state import Run
from pipeline.settings.cluster import asked
from pipeline.settings.config import Config

# Read by Ray's processes when they start, so they must be set before Ray is imported.
ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # or relative paths of a run would break in workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon an end or a loss is seen; 2 s by default
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",  # how soon a notice is seen; 5 s by default
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_BACKEND_LOG_LEVEL": "error",  # its C++ would print warnings among a run's lines
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours to handle
    # And so is SIGTERM, also while Ray starts: its handler would print a stack. Python still prints one of a crash.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}

START_TRIES = 3
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's own"


class NoRoom(Exception):
    """A training found no room for cluster.wait_seconds; raised in Ray's controller, so it holds its message only."""


class Waiting:
    """How long room has been lacking, in one go; `seconds` of it are too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.since: float | None = None

    def too_long(self, lacking: bool) -> bool:
        """Note whether room is lacking now. Whether it has been for too long."""
        now = time.monotonic()
        self.since = (now if self.since is None else self.since) if lacking else None
        return self.since is not None and now - self.since >= self.seconds

    def said(self, missing: str) -> str:
        """What a person is told then; `missing` is what was asked for and what there is."""
        return f"waited cluster.wait_seconds={self.seconds:g} for room. {missing}. The same command goes on"


def connect(config: Config) -> Any:
    """Join cluster.address (a job joins its own cluster), or start Ray on this machine; returns the module.

    Raises Away where no cluster answers, or where it has less than the config asks for: at once, or after
    cluster.wait_seconds where it had enough before. Raises UserError where this machine has too little.
    """
    wanted = config.cluster
    # A range is only tried on nodes that are there; a fixed number may wait for an autoscaler, which is asked again.
    start = min(10.0 if wanted.min_workers < wanted.max_workers else 60.0, wanted.wait_seconds)
    for name, value in (ENVIRONMENT | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{start:g}"}).items():
        os.environ.setdefault(name, value)
    import ray

    patience = wanted.wait_seconds if ray.is_initialized() else 0.0
    if not ray.is_initialized():
        _init(ray, wanted.place, config)
    deadline = time.monotonic() + patience
    while (problem := shortage(nodes(ray), config)) and time.monotonic() < deadline:
        time.sleep(1)
    if problem:
        # On a cluster nodes may still come; this machine stays as it is.
        raise (UserError if started_here(config) else Away)(problem)
    return ray


def started_here(config: Config) -> bool:
    """Whether the run's Ray is one that it starts on this machine."""
    return config.cluster.place == "local"


def coming(config: Config) -> str:
    """What happens while nothing of Ray is to be seen yet."""
    if started_here(config):
        return "Ray starts on this machine, which takes about ten seconds"
    return f"joining the Ray cluster at {config.cluster.place}"


def have(ray: Any) -> str:
    """What a cluster has, as in `2 nodes with 16 CPU and 2 GPU`."""
    there = nodes(ray)
    total = {kind: sum(node.get(kind, 0.0) for node in there) for kind in ("CPU", "GPU")}
    return f"{len(there)} node{'s' * (len(there) != 1)} with {amounts({k: v for k, v in total.items() if v})}"


def nodes(ray: Any) -> list[dict[str, float]]:
    """What each node that is alive has in all, by resource."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def here(ray: Any) -> Any:
    """Where to put an actor that must live as long as this driver: on its node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def sigterm_later() -> Iterator[None]:
    """While Ray comes or goes, SIGTERM waits, and Ray's own handler of it is kept out; ours has it afterwards.

    Half of ray.init cannot be undone: the process would crash at its end. Ray puts Ctrl-C off in the same way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    set_handler, came = signal.signal, threading.Event()
    ours = set_handler(signal.SIGTERM, lambda *_: came.set())

    def set_other(number: int, handler: Any) -> Any:
        return ours if number == signal.SIGTERM else set_handler(number, handler)

    signal.signal = set_other  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        set_handler(signal.SIGTERM, ours)
        if came.is_set():
            signal.raise_signal(signal.SIGTERM)


def check_shared(ray: Any, root: str) -> None:
    """Raise UserError if a node does not see the run's folder: its workers could not find data or checkpoints.

    A URL is not checked: a node that cannot reach it reports this itself.
    """
    if not storage.is_local(root):
        return
    unseen = blind(ray, os.path.join(storage.local_path(root), "lease.json"))
    if unseen:
        raise UserError(
            f"runs_dir: the run's folder '{root}' is not visible on {', '.join(unseen)}: put runs_dir on storage that "
            "all nodes share"
        )


def blind(ray: Any, place: str) -> list[str]:
    """The nodes, of several, that do not see a path; none for a URL, which is not tried."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or not storage.is_local(place):
        return []
    look = ray.remote(num_cpus=0)(os.path.exists)
    path = str(storage.local_path(place))
    seen = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(path)
        for node in nodes
    ]
    return [node["NodeManagerHostname"] for node, each in zip(nodes, seen, strict=True) if not _sees(ray, each)]


def _sees(ray: Any, answer: Any) -> bool:
    """What a node answered; one that has gone in between is not blind, since nothing runs there."""
    try:
        return bool(ray.get(answer))
    except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
        return True


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
    if not config.cluster.ray_logs:
        ray._private.worker.print_to_stdstream = _unheard  # paragraphs on each lost process; ours is one sentence
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it shows tracebacks of what we say in a sentence
    try:
        knock(address)
        start(ray, options)
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"cluster.address={address}: the cluster does not take this token, or wants one and got none: {TOKEN}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise Away(
            f"cluster.address={address}: no Ray cluster answers there ({str(error).splitlines()[0]}); start one with "
            "`ray start --head`, or leave cluster.address out to run on this machine"
        ) from error


def _unheard(*_: object, **__: object) -> None:
    """In the place of what prints Ray's own reports."""


def start(ray: Any, options: dict[str, Any]) -> None:
    """ray.init, tried again where Ray's processes take too long to come up. Raises Away where they never do."""
    for number in range(1, START_TRIES + 1):
        try:
            with sigterm_later():
                ray.init(**options)
            return
        except Exception as error:
            if options["address"] != "local" or not too_slow(error):
                raise
            ray.shutdown()
            if number == START_TRIES:
                raise Away(
                    f"Ray did not come up on this machine in {START_TRIES} tries: it is too busy, or has too little "
                    "memory or shared memory; free some of it, or join a cluster with cluster.address"
                ) from error
            warnings.warn(f"Ray was too slow to come up; try {number + 1} of {START_TRIES}", stacklevel=2)


def too_slow(error: Exception) -> bool:
    """Whether Ray's processes did not come up in time: Ray says it with exceptions of several kinds."""
    return any(words in str(error) for words in ("timed out during startup", "Timed out"))


def knock(address: str) -> None:
    """Raise OSError if nothing listens at host:port; Ray itself would try for minutes."""
    host, sign, port = address.rpartition(":")
    if sign and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


def demand(config: Config) -> dict[str, float]:
    """CPUs and GPUs that the largest stage reserves at most."""
    wanted = config.cluster
    return {
        "CPU": max(wanted.max_workers * wanted.cpus_per_worker, wanted.cpus_per_trial),
        "GPU": max(wanted.max_workers * wanted.gpus_per_worker, wanted.gpus_per_trial),
    }


def shortage(nodes: list[dict[str, float]], config: Config) -> str | None:
    """What was asked for and what the cluster has, where it has too little; Ray itself would wait forever.

    For a range of workers, the smallest number must fit. Each worker or trial must fit on one node.
    """
    wanted = config.cluster
    worker = {"CPU": wanted.cpus_per_worker, "GPU": wanted.gpus_per_worker}
    workers = f"cluster.workers={asked(wanted.workers)}"
    return _shortage(nodes, workers, "worker", worker, wanted.min_workers) or trial_shortage(nodes, config)


def trial_shortage(nodes: list[dict[str, float]], config: Config) -> str | None:
    """What a trial of the scan needs and what the cluster has, where no node can hold one."""
    trial = {"CPU": config.cluster.cpus_per_trial, "GPU": config.cluster.gpus_per_trial}
    return _shortage(nodes, "a scan trial", "trial", trial, 1)


def _shortage(nodes: list[dict[str, float]], who: str, noun: str, each: dict[str, float], count: int) -> str | None:
    if room(nodes, each) >= count:
        return None
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in each}
    lacking = {kind: amount for kind, amount in each.items() if amount * count > total[kind]}
    shown = lacking or {kind: amount for kind, amount in each.items() if amount}
    needs = {kind: amount * count for kind, amount in shown.items()}
    found = f"but the cluster has {amounts({kind: total[kind] for kind in shown})}"
    if not lacking:
        sizes = "; ".join(sorted({amounts({kind: node.get(kind, 0.0) for kind in shown}) for node in nodes}))
        found += f" on nodes of {sizes}, with room for {room(nodes, each)}, since a {noun} must fit on one node"
    per = [f"cluster.{kind.lower()}s_per_{noun}" for kind in shown]
    remedy = " or ".join(["cluster.workers", *per] if noun == "worker" else per)
    return f"{who} with {amounts(shown)} each needs {amounts(needs)}, {found}: lower {remedy}, or add nodes"


def room(nodes: list[dict[str, float]], each: dict[str, float]) -> int:
    """How many workers or trials that need `each` the nodes can hold; a share of a GPU lies on one GPU."""

    def fit(has: float, need: float, kind: str) -> int:
        if kind == "GPU" and need < 1:
            return math.floor(has) * math.floor(1 / need + 1e-6)
        return math.floor(has / need + 1e-6)

    return sum(min(fit(node.get(kind, 0.0), need, kind) for kind, need in each.items() if need) for node in nodes)


def amounts(resources: dict[str, float]) -> str:
    """As in `2 CPU and 0.25 GPU`."""
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


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
    paths["target.latency_table"] = config.target.latency_table
    if config.start.source is not None and "/" in config.start.run:
        paths["start.from"] = config.start.source
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
