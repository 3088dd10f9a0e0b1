"""One writer at a time: a run's lease, with a fencing number that rises with every writer.

On a file system the kernel holds a lock for the writer, and frees it when the process dies. S3 has no locks: there the
lease is taken by a conditional PUT, and a heartbeat renews it. A writer whose last heartbeat is longer ago than the
lease lasts can be taken over.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline import storage
from pipeline.base.errors import UserError

NAME = "lease.json"
_BEATS = 6  # renewals in the time that a lease lasts
_TELL_S = 10.0  # between two lines about waiting


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
        lease = storage.read_json(path) if storage.exists(path) else {"pid": "?", "host": "?"}
        raise _refusal(str(root), lease, "wait for it, stop it") from error
    with held:
        fence = 1 + (storage.read_json(path)["fence"] if storage.exists(path) else 0)
        before()
        storage.write_json(path, _facts(fence))
        yield fence


@contextmanager
def _hold_remote(
    url: str, root: str, seconds: float, before: Callable[[], None], tell: Callable[[str], None]
) -> Iterator[int]:
    there = _when_over(url, root, tell)
    lease = json.loads(there.data) if there is not None else {"fence": 0}
    before()
    facts = {**_facts(lease["fence"] + 1), "machine": _machine(), "seconds": seconds, "token": uuid.uuid4().hex}
    version = storage.put_if(url, storage.as_json(facts), there.version if there is not None else None)
    if version is None:
        raise UserError(f"run '{root}' was taken by another process at the same moment: wait for it, or stop it")
    heart = _Heart(url, facts, version)
    try:
        yield facts["fence"]
    finally:
        heart.stop()


def _when_over(url: str, root: str, tell: Callable[[str], None]) -> storage.Versioned | None:
    """Wait until the lease has ended, and return it. Raises UserError where a live writer renews it meanwhile."""
    there, told = storage.read_versioned(url), -math.inf
    while there is not None:
        lease = json.loads(there.data)
        if _over(lease, there.age_s):
            break
        if lease["machine"] == _machine():  # or its process would be dead
            raise _alive(root, lease, there.age_s)
        if time.monotonic() - told >= _TELL_S:
            told, left = time.monotonic(), lease["seconds"] - there.age_s
            tell(f"waiting for the lease of process {lease['pid']} on {lease['host']} to end ({max(1, left):.0f} s)")
        time.sleep(min(1.0, lease["seconds"] / _BEATS))
        before, there = there, storage.read_versioned(url)
        if there is not None and there.version != before.version and not json.loads(there.data).get("released"):
            raise _alive(root, json.loads(there.data), there.age_s)
    return there


def _alive(root: str, lease: dict[str, Any], age_s: float) -> UserError:
    left = f"wait for it, stop it (a killed one can be taken over {lease['seconds']:g} s after its last heartbeat)"
    return _refusal(root, lease, left, f", last heartbeat {age_s:.0f} s ago")


def _facts(fence: int) -> dict[str, Any]:
    now = time.time_ns() // 1_000_000
    return {"fence": fence, "pid": os.getpid(), "host": socket.gethostname(), "since_ms": now}


def _refusal(root: str, lease: dict[str, Any], remedy: str, heard: str = "") -> UserError:
    return UserError(
        f"run '{root}' is being written by process {lease['pid']} on {lease['host']}{heard}: {remedy}, or use another "
        "name=..."
    )


def _over(lease: dict[str, Any], age_s: float) -> bool:
    """Whether a lease has ended: given back, silent for too long, or of a process of this machine that is dead."""
    if lease.get("released") or age_s > lease["seconds"]:
        return True
    if lease["machine"] != _machine():
        return False
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and somebody else's
        return False
    return False


def _machine() -> str:
    """An identity of this machine, or of this container: process numbers are comparable only within it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


class _Heart:
    """A thread that renews a lease until it is stopped, or another writer has taken the lease."""

    def __init__(self, url: str, facts: dict[str, Any], version: str) -> None:
        self._url, self._facts, self._version = url, facts, version
        self._beats, self._sound = 0, True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and give the lease back. If the store does not answer, the lease ends by itself in time."""
        self._stopping.set()
        self._thread.join(timeout=self._facts["seconds"] / _BEATS)
        if self._sound and not self._thread.is_alive():
            self._renew(released=True)

    def _work(self) -> None:
        while self._sound and not self._stopping.wait(self._facts["seconds"] / _BEATS):
            self._renew()

    def _renew(self, **more: Any) -> None:
        self._beats += 1
        try:
            version = storage.put_if(
                self._url, storage.as_json({**self._facts, "beats": self._beats, **more}), self._version
            )
        except UserError:  # the store is away, and was tried for long; each commit meets the same and says so
            return
        self._sound = version is not None
        self._version = version or self._version
