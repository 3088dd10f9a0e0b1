"""What this machine is busy with, as Linux and NVIDIA's driver tell it; what they do not tell is left out.

The names and units are those of MLflow's own system metrics.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline.base.environment import processor

_PROC = Path("/proc")
_ASKED = ("index", "name", "utilization.gpu", "memory.used", "memory.total", "power.draw", "power.limit")
PATIENCE_S = 10.0  # for the driver's answer; one whose GPU is broken may hang
_MIB, _MB = 2**20, 1e6


def node() -> str:
    """This machine's name in its network."""
    return socket.gethostname()


class Meter:
    """Reads what this machine was busy with since the last reading, or since the meter was made."""

    def __init__(self) -> None:
        self._busy, self._network = _busy(), _network()
        self._at_first = self._network

    def read(self) -> dict[str, float]:
        """Shares in percent, bytes in megabytes (10^6), power in watts; by name.

        The processors' share is the mean since the last reading, the network's bytes those since the first.
        """
        before, self._busy = self._busy, _busy()
        found = dict(_shares(before, self._busy)) | dict(_memory()) | dict(_disk())
        self._network = _network() or self._network
        if self._network is not None and self._at_first is not None:
            for name, now, then in zip(("receive", "transmit"), self._network, self._at_first, strict=True):
                found[f"network_{name}_megabytes"] = (now - then) / _MB
        for row in _gpus():
            found |= _of_gpu(row)
        return {name: round(value, 1) for name, value in found.items()}


def parts() -> str:
    """The processors and GPUs of this machine, as in "64 × AMD EPYC 7763, 2 × NVIDIA H200"."""
    names = [row["name"] for row in _gpus()]
    gpus = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    return ", ".join([f"{os.cpu_count() or 1} × {processor()}", *gpus])


def _busy() -> tuple[float, float] | None:
    """The processors' time so far: in all, and idle."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = [float(value) for value in (_PROC / "stat").read_text().splitlines()[0].split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]
    return None


def _shares(before: tuple[float, float] | None, now: tuple[float, float] | None) -> Iterator[tuple[str, float]]:
    if before is not None and now is not None and now[0] > before[0]:
        yield "cpu_utilization_percentage", 100 * (1 - (now[1] - before[1]) / (now[0] - before[0]))


def _memory() -> Iterator[tuple[str, float]]:
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        lines = (line.split() for line in (_PROC / "meminfo").read_text().splitlines())
        kib = {line[0].rstrip(":"): float(line[1]) for line in lines}
        used = kib["MemTotal"] - kib["MemAvailable"]
        yield "system_memory_usage_megabytes", 1024 * used / _MB
        yield "system_memory_usage_percentage", 100 * used / kib["MemTotal"]


def _disk() -> Iterator[tuple[str, float]]:
    with contextlib.suppress(OSError):
        total, used, free = shutil.disk_usage("/")
        yield "disk_usage_percentage", 100 * used / total
        yield "disk_usage_megabytes", used / _MB
        yield "disk_available_megabytes", free / _MB


def _network() -> tuple[float, float] | None:
    """Bytes that have come and gone, without those from this machine to itself."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        rows = [line.replace(":", " ").split() for line in (_PROC / "net/dev").read_text().splitlines()[2:]]
        outside = [row for row in rows if row[0] != "lo"]
        return sum(float(row[1]) for row in outside), sum(float(row[9]) for row in outside)
    return None


def _gpus() -> list[dict[str, str]]:
    """A row a GPU, as nvidia-smi prints it; none where there is no such program, or it does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(_ASKED, row, strict=True)) for row in rows if len(row) == len(_ASKED)]


def _of_gpu(row: dict[str, str]) -> dict[str, float]:
    """The figures of a GPU; one that it does not tell ("[N/A]") is left out."""
    told: dict[str, float] = {}
    for name, value in row.items():
        with contextlib.suppress(ValueError):
            if math.isfinite(given := float(value)):
                told[name] = given
    found = {"utilization_percentage": told.get("utilization.gpu"), "power_usage_watts": told.get("power.draw")}
    if "memory.used" in told and told.get("memory.total"):
        found["memory_usage_megabytes"] = told["memory.used"] * _MIB / _MB
        found["memory_usage_percentage"] = 100 * told["memory.used"] / told["memory.total"]
    if "power.draw" in told and told.get("power.limit"):
        found["power_usage_percentage"] = 100 * told["power.draw"] / told["power.limit"]
    return {f"gpu_{row['index']}_{name}": value for name, value in found.items() if value is not None}
