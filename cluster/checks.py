"""What `secateur doctor` checks of Ray. Ray is not started for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import metadata

from cluster import connect
from pipeline.cli.doctor import Check, Finding
from pipeline.results.words import size
from pipeline.settings.cluster import Cluster
from pipeline.settings.config import Config

LITTLE_SHM = 2**28  # bytes of /dev/shm, where Ray keeps objects and NCCL exchanges gradients


def ray(config: Config | None) -> Iterator[Finding]:
    """Ray's version, and whether the cluster that is meant answers."""
    try:
        found = f"Ray {metadata.version('ray')}"
    except metadata.PackageNotFoundError:
        yield Finding("Ray", "broken", "not installed", "Install secateur again with pip, or use python -m pipeline")
        return
    address = (Cluster.model_validate({}) if config is None else config.cluster).place
    if address == "local":
        cpus = os.cpu_count() or 1
        yield Finding("Ray", "ok", f"{found}, started on this machine when needed ({cpus} CPU)")
        return
    try:
        connect.knock(address)
    except OSError as error:
        remedy = "Start it with `ray start --head`, or give the address of one that runs (cluster.address, RAY_ADDRESS)"
        yield Finding("Ray", "broken", f"{found}, and nothing answers at {address} ({error.strerror or error})", remedy)
        return
    token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    said = "with a token" if token else "without a token; if it wants one, set RAY_AUTH_MODE and RAY_AUTH_TOKEN"
    yield Finding("Ray", "ok", f"{found}, cluster at {address}, {said}")


def shared_memory(config: Config | None) -> Iterator[Finding]:
    """Whether /dev/shm has room."""
    if not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free
    if free < LITTLE_SHM:
        remedy = "In a container: give it more, as by --shm-size=2g"
        yield Finding("/dev/shm", "warning", f"{size(free)} free; Ray and NCCL want more", remedy)
    else:
        yield Finding("/dev/shm", "ok", f"{size(free)} free")


ALL: tuple[Check, ...] = (ray, shared_memory)
