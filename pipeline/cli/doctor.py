"""`secateur doctor`: is everything here that a run needs? One line each, with a remedy where it is not."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record, plain
from pipeline.base.version import VERSION
from pipeline.cli import commands
from pipeline.results.words import size
from pipeline.settings.config import Config
from pipeline.tracking import server

BROKEN = 1  # exit code where a check found something broken
LITTLE_DISK, LEAST_DISK = 5e9, 2e8  # bytes that are free: fewer are a warning, and something broken
SKEW_S = 5.0  # seconds by which a clock may differ
STATES = {"ok": "ok     ", "warning": "warning", "broken": "BROKEN "}


@dataclass(frozen=True)
class Finding(Record):
    """What one check found; `remedy` is empty where all is well."""

    what: str
    state: Literal["ok", "warning", "broken"]
    found: str
    remedy: str = ""


Check = Callable[[Config | None], Iterable[Finding]]  # a config that somebody wants to run, if one was given


def show(path: str | None, overrides: list[str], more: Iterable[Check], as_json: bool) -> int:
    """Make all checks and print what they find; returns the exit code."""
    config = None if path is None else commands.load(path, overrides)
    found = [finding for check in (*CHECKS, *more) for finding in check(config)]
    if as_json:
        print(json.dumps(plain(found), indent=1))
    else:
        for each in found:
            print(f"{STATES[each.state]} {each.what}: {each.found}" + (f". {each.remedy}" if each.remedy else ""))
    return BROKEN if any(each.state == "broken" for each in found) else 0


def versions(config: Config | None) -> Iterator[Finding]:
    """Python, secateur, and that all packages that it requires are installed."""
    missing = [name for name in _required() if not _installed(name)]
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision") if _installed(name))
    said = f"secateur {VERSION}, Python {platform.python_version()}, {shown}"
    if missing:
        yield Finding("versions", "broken", f"{said}; missing: {', '.join(missing)}", "Install secateur again with pip")
    else:
        yield Finding("versions", "ok", said)


def gpu(config: Config | None) -> Iterator[Finding]:
    """The GPUs that this process sees, and NCCL, by which several of them talk."""
    wanted = config is not None and (config.device == "cuda" or config.cluster.gpus_per_worker > 0)
    if torch.cuda.is_available():
        free = [torch.cuda.mem_get_info(number) for number in range(torch.cuda.device_count())]
        cards = [
            f"{torch.cuda.get_device_name(number)} ({size(left)} of {size(total)} free)"
            for number, (left, total) in enumerate(free)
        ]
        yield Finding("GPU", "ok", ", ".join(cards))
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", "ok", nccl)
        return
    hardware = sorted(Path("/dev").glob("nvidia[0-9]*"))
    built = torch.version.cuda
    if hardware:
        remedy = "install torch with CUDA" if built is None else f"install a driver that CUDA {built} works with"
        yield Finding("GPU", "broken", f"{len(hardware)} here, and torch sees none", remedy.capitalize())
    elif wanted:
        remedy = "Set device=auto and cluster.gpus_per_worker=0, or run it where the GPUs are"
        yield Finding("GPU", _missing(config), "none here, and the config asks for one", remedy)
    else:
        yield Finding("GPU", "ok", "none here: trainings use the CPU")


def host(config: Config | None) -> Iterator[Finding]:
    """Whether this machine's name resolves to an address that other machines can reach."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        yield Finding("host", "warning", f"{name} has no address", "With several nodes: add it to DNS or /etc/hosts")
        return
    if address.startswith("127."):
        remedy = "With several nodes: let it resolve to an outer address, or set GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        yield Finding("host", "warning", f"{name} is {address}, which other machines cannot reach", remedy)
    else:
        yield Finding("host", "ok", f"{name} is {address}")


def disk(config: Config | None) -> Iterator[Finding]:
    """Whether runs_dir can be written, has room, and has the clock of this machine."""
    runs_dir = "runs" if config is None else config.runs_dir
    if not storage.is_local(runs_dir):
        return
    folder = storage.local_path(runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    said = f"{size(free)} free in {folder}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".secateur-") as file:
            file.write(b"x")
            file.flush()
            skew = os.stat(file.name).st_mtime - time.time()
    except OSError as error:
        yield Finding(
            "disk", "broken", f"{folder} cannot be written ({error.strerror})", "Set runs_dir to a folder of yours"
        )
        return
    if free < LITTLE_DISK:
        state: Literal["broken", "warning"] = "broken" if free < LEAST_DISK else "warning"
        yield Finding(
            "disk", state, said, "Free some, or set runs_dir to a larger disk; `secateur plan` says what a run takes"
        )
    else:
        yield Finding("disk", "ok", said)
    if abs(skew) > SKEW_S:
        yield Finding(
            "clock", "broken", f"{skew:+.0f} s between this machine and {folder}", "Let both set their clocks by NTP"
        )
    else:
        yield Finding("clock", "ok", f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, that of the disk")


def files(config: Config | None) -> Iterator[Finding]:
    """Whether what a config names on a disk is here."""
    if config is None:
        return
    data, model = config.data, config.model
    named = {"data.root": data.root, "data.class_index": data.class_index, "model.checkpoint": model.checkpoint}
    for setting, place in named.items():
        if place is None or not storage.is_local(place):
            continue
        if storage.local_path(place).exists():
            yield Finding("files", "ok", f"{setting}={place} is here")
            continue
        yield Finding(
            "files", _missing(config), f"{setting}={place} is not here", f"Set {setting} to where it lies on every node"
        )


def s3(config: Config | None) -> Iterator[Finding]:
    """Whether the S3 places of a config answer; runs_dir must also heed conditional writes."""
    if config is None:
        return
    places = {"runs_dir": config.runs_dir, "data.root": config.data.root, "model.checkpoint": config.model.checkpoint}
    for setting, url in places.items():
        if url is None or not storage.is_s3(url):
            continue
        try:
            if setting == "runs_dir" and (ignored := storage.ignored_conditions(url)):
                remedy = "Use a store that heeds them: a run has one writer by them"
                yield Finding("S3", "broken", f"{setting}={url}: its store ignores {' and '.join(ignored)}", remedy)
                continue
            storage.exists(storage.join(url, "manifest.json"))
            yield Finding("S3", "ok", f"{setting}={url} answers")
        except (UserError, OSError) as error:
            yield Finding(
                "S3", "broken", f"{setting}={url}: {error}", "See that the credentials of the AWS chain may use it"
            )


def mlflow(config: Config | None) -> Iterator[Finding]:
    """Whether the tracking server of the config, or of MLFLOW_TRACKING_URI, answers."""
    if config is not None and not config.tracking.enabled:
        yield Finding("MLflow", "ok", "tracking.enabled=false")
        return
    if not _installed("mlflow"):
        yield Finding("MLflow", "broken", "not installed", "Install it, or set tracking.enabled=false")
        return
    if config is None or config.tracking.uri is None:
        yield Finding("MLflow", "ok", f"{metadata.version('mlflow')}, sqlite in runs_dir")
        return
    try:
        yield Finding("MLflow", "ok", f"{metadata.version('mlflow')}, {server.look(config)} answers")
    except UserError as error:
        yield Finding("MLflow", "broken", str(error), "A run goes on without it; `secateur sync RUN` mends that later")


def _missing(config: Config | None) -> Literal["broken", "warning"]:
    """How bad it is that this machine lacks something: less, where the work is done on others."""
    return "warning" if config is not None and config.cluster.place != "local" else "broken"


def _required() -> list[str]:
    """The names of the packages that secateur requires, without those of its extras."""
    try:
        listed = metadata.requires("secateur") or []
    except metadata.PackageNotFoundError:
        return []
    names = (re.match(r"[A-Za-z0-9._-]+", each) for each in listed if "extra ==" not in each)
    return [name[0] for name in names if name is not None]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


CHECKS: tuple[Check, ...] = (versions, gpu, host, disk, files, s3, mlflow)
