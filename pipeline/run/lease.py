"""One writer at a time: a run's lease, with a fencing number that rises with every writer.

On a file system the kernel holds a lock for the writer, and frees it when the process dies. S3 has no locks: there the
lease is taken by a conditional PUT, and a heartbeat renews it. A writer whose last heartbeat is longer ago than the
lease lasts can be taken over.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record, optional

NAME = "lease.json"
_BEATS = 6  # renewals in the time that a lease lasts
_TELL_S = 10.0  # between two lines about waiting


@dataclass(frozen=True)
class Lease(Record):
    """lease.json: who writes a run. On a file system a lock holds it, and the fields from `machine` on are left out.

    `machine` is where `pid` is a process; the lease lasts `seconds` beyond its last renewal, of which `beats` were.
    """

    fence: int
    pid: int = 0
    host: str = "?"
    since_ms: int = 0
    machine: str | None = optional()
    seconds: float | None = optional()
    token: str | None = optional()
    beats: int | None = optional()
    released: bool | None = optional()

    @property
    def lasts(self) -> float:
        """Seconds; none on a file system."""
        return self.seconds or 0.0

    @classmethod
    def mine(cls, fence: int) -> Lease:
        """That of this process."""
        return cls(fence, os.getpid(), socket.gethostname(), time.time_ns() // 1_000_000)

    def over(self, age_s: float) -> bool:
        """Whether it has ended: given back, silent for too long, or of a process of this machine that is dead."""
        if self.released or age_s > self.lasts:
            return True
        if self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # alive, and somebody else's
            return False
        return False


def hold(root: str, seconds: float, before: Callable[[], None], tell: Callable[[str], None]) -> Any:
    """Hold the lease of a run while the block lasts; gives the fencing number.

    `before` is called when it is clear that no other process writes, and before anything is written. On S3 the lease
    lasts `seconds` beyond its last renewal. If its writer may be dead, this waits for the lease to end, and `tell` says
    so. Raises UserError that names the process that holds the lease.
    """
    if storage.is_local(root):
        return _hold_local(storage.local_path(root), before)
    return _hold_remote(storage.join(root, NAME), root, seconds, before, tell)


@contextmanager
def _hold_local(root: Path, before: Callable[[], None]) -> Iterator[int]:
    path = str(root / NAME)
    try:  # a soft lock would outlive a killed process
        held = FileLock(root / ".lock", blocking=False, thread_local=False, fallback_to_soft=False).acquire()
    except Timeout as error:
        lease = Lease.from_json(storage.read_json(path), path) if storage.exists(path) else Lease(0)
        raise _refusal(str(root), lease, "wait for it, stop it") from error
    with held:
        fence = 1 + (Lease.from_json(storage.read_json(path), path).fence if storage.exists(path) else 0)
        before()
        storage.write_json(path, Lease.mine(fence).to_json())
        yield fence


@contextmanager
def _hold_remote(
    url: str, root: str, seconds: float, before: Callable[[], None], tell: Callable[[str], None]
) -> Iterator[int]:
    there = _when_over(url, root, tell)
    fence = _read(there, url).fence + 1 if there is not None else 1
    before()
    lease = dataclasses.replace(Lease.mine(fence), machine=_machine(), seconds=seconds, token=uuid.uuid4().hex)
    version = storage.put_if(url, storage.as_json(lease.to_json()), there.version if there is not None else None)
    if version is None:
        raise UserError(f"run '{root}' was taken by another process at the same moment: wait for it, or stop it")
    heart = _Heart(url, lease, version)
    try:
        yield fence
    finally:
        heart.stop()


def _when_over(url: str, root: str, tell: Callable[[str], None]) -> storage.Versioned | None:
    """Wait until the lease has ended, and return it. Raises UserError where a live writer renews it meanwhile."""
    there, told = storage.read_versioned(url), -math.inf
    while there is not None:
        lease = _read(there, url)
        if lease.over(there.age_s):
            break
        if lease.machine == _machine():  # or its process would be dead
            raise _alive(root, lease, there.age_s)
        if time.monotonic() - told >= _TELL_S:
            told, left = time.monotonic(), lease.lasts - there.age_s
            tell(f"waiting for the lease of process {lease.pid} on {lease.host} to end ({max(1, left):.0f} s)")
        time.sleep(min(1.0, lease.lasts / _BEATS))
        before, there = there, storage.read_versioned(url)
        if there is not None and there.version != before.version and not _read(there, url).released:
            raise _alive(root, _read(there, url), there.age_s)
    return there


def _read(there: storage.Versioned, url: str) -> Lease:
    return Lease.from_json(json.loads(there.data), url)


def _alive(root: str, lease: Lease, age_s: float) -> UserError:
    left = f"wait for it, stop it (a killed one can be taken over {lease.lasts:g} s after its last heartbeat)"
    return _refusal(root, lease, left, f", last heartbeat {age_s:.0f} s ago")


def _refusal(root: str, lease: Lease, remedy: str, heard: str = "") -> UserError:
    return UserError(
        f"run '{root}' is being written by process {lease.pid or '?'} on {lease.host}{heard}: {remedy}, or use another "
        "name=..."
    )


def _machine() -> str:
    """An identity of this machine, or of this container: process numbers are comparable only within it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


class _Heart:
    """A thread that renews a lease until it is stopped, or another writer has taken the lease."""

    def __init__(self, url: str, lease: Lease, version: str) -> None:
        self._url, self._lease, self._version = url, lease, version
        self._beats, self._sound = 0, True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and give the lease back. If the store does not answer, the lease ends by itself in time."""
        self._stopping.set()
        self._thread.join(timeout=self._lease.lasts / _BEATS)
        if self._sound and not self._thread.is_alive():
            self._renew(released=True)

    def _work(self) -> None:
        while self._sound and not self._stopping.wait(self._lease.lasts / _BEATS):
            self._renew()

    def _renew(self, released: bool | None = None) -> None:
        self._beats += 1
        lease = dataclasses.replace(self._lease, beats=self._beats, released=released)
        try:
            version = storage.put_if(self._url, storage.as_json(lease.to_json()), self._version)
        except UserError:  # the store is away, and was tried for long; each commit meets the same and says so
            return
        self._sound = version is not None
        self._version = version or self._version
