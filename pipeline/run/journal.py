"""Records that are added one by one: files of JSON lines in a folder of the run, which only grow.

A journal writes what it is given, and never again what was there before. Each journal has files of its own, so it
never writes behind a line that a killed one left torn. On a file system it is one file, and a line is in it when `add`
returns. On S3, where nothing can be appended, a thread writes the lines that came while it wrote the ones before as one
small file; a lazy journal lets lines wait longer the older it is, so that days make no tens of thousands of files. A
folder has one writer at a time, the holder of the run's lease.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, Self, TypeVar

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record
from pipeline.run.state import Run

SYNC_S = 1.0  # seconds at least from one sync of a local file to the next
LAZY, LAZY_S = 0.01, 60.0  # what is lazy waits on S3 for this share of its age; a journal for so many seconds at most
KNOWN = 2**16  # files on S3 that a process remembers
LAST_S = 30.0  # seconds that a journal on S3 is waited for where the run ends by an error
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False)
_NAME = re.compile(r"(\d{6,})-(\d{6,})\.jsonl")  # the writer's number and the file's

R = TypeVar("R", bound=Record)


def lazy_s(began: float, most: float = LAZY_S) -> float:
    """How many seconds lines for S3 wait for each other, where their writer `began` (`time.monotonic`).

    The older it is the longer, so that days make no tens of thousands of files.
    """
    return min(most, LAZY * (time.monotonic() - began))


class Journal:
    """Adds records to a folder of the run; to be used in a `with` block.

    `add` and the end of the block raise RunStopped where the run was taken over, and UserError where the store refuses.
    """

    def __init__(self, run: Run, *folder: str, lazy: bool = False) -> None:
        self._run, self._folder = run, run.path(*folder)
        ours = [number for writer, number in map(_numbers, _files(self._folder)) if writer == run.fence]
        self._next = 1 + max(ours, default=0)
        local = storage.is_local(run.root)
        self._lines: _Lines = _Appended(self._file, run.check_fence) if local else _Sent(self._send, lazy)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._lines.close(None)
        else:
            self.give_up()  # the error that ends the block is the one to be told

    def give_up(self) -> None:
        """End the journal as an error does: on S3 its last lines are waited for LAST_S seconds. Raises nothing."""
        with contextlib.suppress(Exception):
            self._lines.close(LAST_S)

    def add(self, record: Record) -> None:
        """Add a record. NaN and infinity are our mistake: ValueError."""
        self._lines.add(_ENCODER.encode(record.to_json()).encode() + b"\n")

    def _file(self) -> str:
        name = f"{self._run.fence:06d}-{self._next:06d}.jsonl"
        self._next += 1
        return storage.join(self._folder, name)

    def _send(self, data: bytes) -> None:
        storage.write_bytes(self._file(), data, check=self._run.check_fence)


class Kept:
    """A journal that is written while a run goes on, from any thread. Whatever goes wrong with it, the run goes on.

    `tell` is told once, that `what` cannot be kept; the journal ends there.
    """

    def __init__(self, run: Run, folder: str, what: str, tell: Callable[[str], None]) -> None:
        self._run, self._folder, self._what, self._tell = run, folder, what, tell
        self._lock = threading.Lock()
        self._book: Journal | None = None
        self._sound = True

    def add(self, record: Record) -> None:
        """Add a record. Raises nothing of its own."""
        with self._lock:
            if not self._sound:
                return
            try:
                if self._book is None:
                    self._book = Journal(self._run, self._folder, lazy=True)
                self._book.add(record)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong with it, the run must not end by it
                self._sound = False
                self._tell(f"{self._what} cannot be kept ({error or type(error).__name__}); the run goes on")

    def close(self) -> None:
        """Bring the last lines to their place. Raises nothing of its own."""
        with self._lock:
            if self._book is not None:
                self._book.give_up()


@contextmanager
def kept(run: Run, folder: str, what: str, tell: Callable[[str], None]) -> Iterator[Kept]:
    """A journal for as long as the block lasts."""
    book = Kept(run, folder, what, tell)
    try:
        yield book
    finally:
        book.close()


def read(run: Run, kind: type[R], *folder: str) -> Iterator[R]:
    """The records in a folder, in the order in which they were added; none where there is no folder.

    A file's last line without an end is what a killed writer left, and is passed over. Raises UserError for a line that
    holds something else.
    """
    place = run.path(*folder)
    known = storage.stats(place)
    for name in _in_order(known):
        url = storage.join(place, name)
        if storage.is_s3(url):
            yield from _remembered(kind, url, known[name].version)  # type: ignore[arg-type]  # a class can be hashed
        else:
            yield from _records(kind, url)


@functools.lru_cache(maxsize=KNOWN)
def _remembered(kind: type[R], url: str, version: str) -> tuple[R, ...]:
    """The records of a file on S3. It never grows, so it is fetched once, however often MLflow is synced."""
    return tuple(_records(kind, url))


def _records(kind: type[R], url: str) -> Iterator[R]:
    with storage.open_range(url) as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            yield kind.from_json(_parsed(line, url, number), f"{url}, line {number}")


def copy(source: Run, target: Run, *folder: str) -> None:
    """Copy the journals below a folder of another run, those of its folders too; files that are there stay."""
    for name in _files(source.path(*folder)):
        if not target.has(*folder, name):
            target.check_fence()
            storage.copy(source.path(*folder, name), target.path(*folder, name))
    for name in storage.list_folders(source.path(*folder)):
        copy(source, target, *folder, name)


def _files(folder: str) -> list[str]:
    return _in_order(storage.list_files(folder))


def _in_order(names: Iterable[str]) -> list[str]:
    return sorted(filter(_NAME.fullmatch, names), key=_numbers)


def _numbers(name: str) -> tuple[int, int]:
    found = _NAME.fullmatch(name)
    assert found is not None, name
    return int(found[1]), int(found[2])


def _parsed(line: bytes, url: str, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(
            f"'{url}' is damaged in line {number} ({error}): restore it, or delete it and run the same command again"
        ) from error


class _Lines(Protocol):
    """Where the lines go."""

    def add(self, line: bytes) -> None: ...

    def close(self, patience: float | None) -> None: ...


class _Appended:
    """One file on this machine. Every SYNC_S seconds at most it is synced, and the lease is looked at."""

    def __init__(self, name: Callable[[], str], check: Callable[[], None]) -> None:
        self._name, self._check = name, check
        self._file: storage.Appending | None = None
        self._synced = 0.0

    def add(self, line: bytes) -> None:
        due = self._file is None or time.monotonic() - self._synced >= SYNC_S
        if due:
            self._check()
        if self._file is None:
            self._file = storage.appending(self._name())
        self._file.write(line)
        if due:
            self._file.sync()
            self._synced = time.monotonic()

    def close(self, patience: float | None) -> None:
        if self._file is not None:
            self._file.sync()
            self._file.close()


class _Sent:
    """A thread that hands the lines that wait to `send`, all of them together, and raises its error in this one."""

    def __init__(self, send: Callable[[bytes], None], lazy: bool) -> None:
        self._send, self._lazy, self._began = send, lazy, time.monotonic()
        self._state = threading.Condition()
        self._waiting: list[bytes] = []
        self._error: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)
        self._thread.start()

    def add(self, line: bytes) -> None:
        with self._state:
            if self._error is not None:
                raise self._error
            self._waiting.append(line)
            self._state.notify_all()

    def close(self, patience: float | None) -> None:
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join(patience)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._waiting or self._closing)
                if self._lazy:
                    self._state.wait_for(lambda: self._closing, lazy_s(self._began))
                lines, self._waiting = self._waiting, []
            if not lines:
                return
            try:
                self._send(b"".join(lines))
            except Exception as error:  # noqa: BLE001 - whatever it is, the thread that adds raises it
                with self._state:
                    self._error = error
                return
