"""One writer at a time: a run's lease, with a fencing number that rises with every writer, and a token of its own.

On a file system the kernel holds a lock for the writer, and frees it when the process dies. S3 has no locks: there the
lease is taken by a conditional PUT, and a heartbeat renews it. A writer whose last heartbeat is longer ago than the
lease lasts can be taken over, so it stops by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.base import process
from pipeline.base.errors import Lost, RunStopped, UserError
from pipeline.base.record import Record, optional

NAME = "lease.json"
_BEATS = 6  # renewals in the time that a lease lasts
_TELL_S = 10.0  # between two lines about waiting


@dataclass(frozen=True)
class Lease(Record):
    """lease.json: who writes a run; no two writers have the same `token`.

    `released` says that it was given back. On a file system a lock holds it, and the other fields from `machine` on are
    left out. `machine` is where `pid` is a process that started at `start` (`process.started`); the lease lasts
    `seconds` beyond its last renewal, of which `beats` were.
    """

    fence: int
    pid: int = 0
    host: str = "?"
    since_ms: int = 0
    token: str | None = optional()
    machine: str | None = optional()
    start: int | None = optional()
    seconds: float | None = optional()
    beats: int | None = optional()
    released: bool | None = optional()

    @property
    def lasts(self) -> float:
        """Seconds; none on a file system."""
        return self.seconds or 0.0

    @classmethod
    def mine(cls, fence: int) -> Lease:
        """That of this process."""
        now = time.time_ns() // 1_000_000
        return cls(fence, os.getpid(), socket.gethostname(), now, uuid.uuid4().hex)

    def over(self, age_s: float) -> bool:
        """Whether it has ended: given back, silent for too long, or of a process of this machine that is dead."""
        if self.released or age_s > self.lasts:
            return True
        return self.machine == process.machine() and not process.lives(self.pid, self.start)


@dataclass(frozen=True)
class Held:
    """A lease that this process holds. `alive` raises Lost where it has ended; it asks the clock alone."""

    fence: int
    token: str | None
    alive: Callable[[], None] = lambda: None


def hold(
    root: str, seconds: float, before: Callable[[], None], tell: Callable[[str], None]
) -> AbstractContextManager[Held]:
    """Hold the lease of a run while the block lasts.

    `before` is called when it is clear that no other process writes, and before anything is written. On S3 the lease
    lasts `seconds` beyond its last renewal. If its writer may be dead, this waits for the lease to end, and `tell` says
    so. Raises UserError that names the process that holds the lease, or says why there can be no lease.
    """
    if storage.is_local(root):
        return _hold_local(storage.local_path(root), before)
    return _hold_remote(storage.join(root, NAME), root, seconds, before, tell)


def holder(root: str) -> str | None:
    """Who writes a run now, as far as can be seen from here without touching it; None where nobody does."""
    url = storage.join(root, NAME)
    if storage.is_local(root):
        if not storage.exists(url):
            return None
        lease = _parsed(storage.read_bytes(url), url)
        if lease.released:
            return None
        if lease.host != socket.gethostname():  # its kernel holds the lock
            return f"process {lease.pid} on {lease.host}, if that is still alive, which cannot be seen from here"
        age_s = process.age_s(lease.pid)  # of one that is younger than the lease, the id is used again
        held = age_s is not None and age_s > time.time() - lease.since_ms / 1000 - 1
        return f"process {lease.pid} on this machine" if held else None
    there = storage.read_versioned(url)
    if there is None:
        return None
    lease = _parsed(there.data, url)
    return None if lease.over(there.age_s) else f"process {lease.pid} on {lease.host}, heard {there.age_s:.0f} s ago"


def require(root: str, fence: int, token: str | None) -> None:
    """Raise RunStopped where the lease of a run is another writer's, and Lost where it has ended on S3."""
    url = storage.join(root, NAME)
    age_s = 0.0
    try:
        if storage.is_local(root):
            data = storage.read_bytes(url)
        else:
            found = storage.read_versioned(url)
            if found is None:
                raise FileNotFoundError(url)
            data, age_s = found.data, found.age_s
    except FileNotFoundError as error:
        raise RunStopped(f"run '{root}' has no {NAME} any more, so it was removed; this process stops") from error
    except OSError as error:
        raise _unusable(root, error) from error
    holder = _parsed(data, url)
    if (holder.fence, holder.token) != (fence, token):
        raise RunStopped(f"run '{root}' was taken over by process {holder.pid} on {holder.host}; this one stops")
    if age_s > holder.lasts:
        raise Lost(_ended(root, age_s, holder.lasts))


def over(root: str) -> bool:
    """Whether a run's last writer is surely gone: its lease has ended, or its process on this machine is dead.

    False where the run has no lease, or a local one that was taken on another machine.
    """
    return storage.exists(storage.join(root, NAME)) and holder(root) is None


@contextmanager
def _hold_local(root: Path, before: Callable[[], None]) -> Iterator[Held]:
    path = str(root / NAME)
    with ExitStack() as stack:
        try:
            stack.enter_context(storage.locked(root / ".lock", f"runs_dir={root.parent}", wait=False))
            known = _parsed(storage.read_bytes(path), path) if storage.exists(path) else Lease(0)
        except storage.LockedByAnother as error:
            known = _parsed(storage.read_bytes(path), path) if storage.exists(path) else Lease(0)
            raise _refusal(str(root), known, "wait for it, stop it") from error
        except OSError as error:
            raise _unusable(str(root), error) from error
        before()
        lease = Lease.mine(known.fence + 1)
        try:
            storage.write_json(path, lease.to_json())
        except OSError as error:
            raise _unusable(str(root), error) from error
        try:
            yield Held(lease.fence, lease.token)
        finally:
            _give_back(path, lease)


def _give_back(path: str, lease: Lease) -> None:
    """Say that this process writes no more, though it may live on; the lock ends in any case."""
    with contextlib.suppress(OSError, UserError):  # a folder that is gone, or a disk that is full
        if _parsed(storage.read_bytes(path), path).token == lease.token:
            storage.write_json(path, dataclasses.replace(lease, released=True).to_json())


@contextmanager
def _hold_remote(
    url: str, root: str, seconds: float, before: Callable[[], None], tell: Callable[[str], None]
) -> Iterator[Held]:
    there = _when_over(url, root, tell)
    fence = _parsed(there.data, url).fence + 1 if there is not None else 1
    before()
    _require_conditions(root)
    mine = Lease.mine(fence)
    lease = dataclasses.replace(mine, machine=process.machine(), start=process.started(mine.pid), seconds=seconds)
    began = process.since_boot()
    version = storage.put_if(url, storage.as_json(lease.to_json()), there.version if there is not None else None)
    if version is None:
        raise UserError(f"run '{root}' was taken by another process at the same moment: wait for it, or stop it")
    heart = _Heart(root, lease, version, began)
    try:
        yield Held(fence, lease.token, heart.check)
    finally:
        heart.stop()


def _require_conditions(root: str) -> None:
    ignored = storage.ignored_conditions(root)
    if ignored:
        raise UserError(
            f"runs_dir={root.rpartition('/')[0]}: its store, or something on the way there, ignores "
            f"{' and '.join(ignored)}, by which a run is kept to one writer: use a store that heeds them, let nothing "
            "strip these headers, or put runs_dir on a disk"
        )


def _when_over(url: str, root: str, tell: Callable[[str], None]) -> storage.Versioned | None:
    """Wait until the lease has ended, and return it. Raises UserError where a live writer renews it meanwhile."""
    there, told = storage.read_versioned(url), -math.inf
    while there is not None:
        lease = _parsed(there.data, url)
        if lease.over(there.age_s):
            break
        if lease.machine == process.machine():  # or its process would be dead
            raise _alive(root, lease, there.age_s)
        if time.monotonic() - told >= _TELL_S:
            told, left = time.monotonic(), lease.lasts - there.age_s
            tell(f"waiting for the lease of process {lease.pid} on {lease.host} to end ({max(1, left):.0f} s)")
        time.sleep(min(1.0, lease.lasts / _BEATS))
        before, there = there, storage.read_versioned(url)
        if there is not None and there.version != before.version and not _parsed(there.data, url).released:
            raise _alive(root, _parsed(there.data, url), there.age_s)
    return there


def _parsed(data: bytes, url: str) -> Lease:
    return Lease.from_json(storage.parse_json(data, url), url)


def _alive(root: str, lease: Lease, age_s: float) -> UserError:
    left = f"wait for it, stop it (a killed one can be taken over {lease.lasts:g} s after its last heartbeat)"
    return _refusal(root, lease, left, f", last heartbeat {age_s:.0f} s ago")


def _refusal(root: str, lease: Lease, remedy: str, heard: str = "") -> UserError:
    return UserError(
        f"run '{root}' is being written by process {lease.pid or '?'} on {lease.host}{heard}: {remedy}, or use another "
        "name=..."
    )


def _unusable(root: str, error: OSError) -> UserError:
    return UserError(
        f"run '{root}': its {NAME} cannot be read or written ({error.strerror}): see that its file system is there and "
        "allows it, then run the same command again, or use another runs_dir=..."
    )


def _ended(root: str, silent: float, lasts: float) -> str:
    return (
        f"run '{root}': its lease was not renewed for {silent:.0f} s (its process was stopped, or did not reach the "
        f"store), longer than cluster.lease_seconds={lasts:g}, so another may have taken the run over; this one stops, "
        "and what is finished is kept: run the same command again, or raise cluster.lease_seconds"
    )


class _Heart:
    """A thread that renews a lease until it is stopped, another writer has taken the lease, or the lease has ended.

    A lease that was not renewed for as long as it lasts has ended, even if nobody took it: this process may have been
    stopped meanwhile, and does not know what others did. It is not renewed any more.
    """

    def __init__(self, root: str, lease: Lease, version: str, began: float) -> None:
        """`version` is the lease's on the store; it was written after `began`, seconds of `process.since_boot`."""
        self._root, self._url, self._lease = root, storage.join(root, NAME), lease
        self._version, self._renewed = version, began
        self._beats, self._sound = 0, True
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise Lost where the last renewal is longer ago than the lease lasts. Asks the clock, not the store."""
        silent = process.since_boot() - self._renewed
        if silent > self._lease.lasts:
            raise Lost(_ended(self._root, silent, self._lease.lasts))

    def stop(self) -> None:
        """End the thread, and give the lease back. If the store does not answer, the lease ends by itself in time."""
        self._stopping.set()
        self._thread.join(timeout=self._lease.lasts / _BEATS)
        if self._sound and not self._thread.is_alive():
            self._renew(released=True)

    def _work(self) -> None:
        interval = pause = self._lease.lasts / _BEATS
        while self._sound and not self._stopping.wait(pause):
            # A renewal counts from its first try: where that was long ago, the next one is due.
            pause = max(0.0, self._renewed + interval - process.since_boot()) if self._renew() else interval

    def _renew(self, released: bool | None = None) -> bool:
        """Renew the lease, or give it back; whether that was done."""
        self._beats += 1
        lease = dataclasses.replace(self._lease, beats=self._beats, released=released)
        data, began = storage.as_json(lease.to_json()), process.since_boot()
        try:
            version = storage.put_if(self._url, data, self._version, self.check, lease.lasts / _BEATS / 2)
            if version is None:
                self._look()
                return False
        except UserError:  # the store is away, and was tried for long; each commit meets the same and says so
            return False
        except RunStopped:  # the lease has ended; each commit says so
            self._sound = False
            return False
        self._version, self._renewed = version, began
        return True

    def _look(self) -> None:
        """See whose the lease is where it is of another version: ours, if all answers to a renewal were lost."""
        there = storage.read_versioned(self._url)
        if there is not None and _parsed(there.data, self._url).token == self._lease.token:
            self._version = there.version
        else:
            self._sound = False
