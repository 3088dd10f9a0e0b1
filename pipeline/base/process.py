"""Processes of this machine, and whether one of them still lives. Linux tells it in /proc."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

MIRROR_THREAD = "mlflow-mirror"  # may still wait for MLflow when its process ends
_START = 19  # the place of field 22, the start, behind the command's name, which is field 2


def machine() -> str:
    """An identity of this machine since its last boot, or of this container: process ids are comparable only within."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> int | None:
    """When a process of this machine started, in the kernel's ticks since its boot; None where it cannot be seen."""
    try:
        text = Path("/proc", str(pid), "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[_START])  # a command's name may hold spaces and brackets


def age_s(pid: int) -> float | None:
    """Seconds since a process of this machine started; None where there is none, or it cannot be seen."""
    ticks = started(pid)
    return None if ticks is None else max(0.0, since_boot() - ticks / os.sysconf("SC_CLK_TCK"))


def lives(pid: int, start: int | None) -> bool:
    """Whether the process of this machine with that id and that start is there.

    Ids are used again: of one that started at another time, the process that is meant has ended. With `start` None, the
    id alone decides.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is there, and somebody else's
        pass
    found = started(pid)
    return start is None or found is None or found == start


def since_boot() -> float:
    """Seconds on a clock that only goes forward, also while the process or the whole machine is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
