"""Reading a run's own log (`run/log.py` writes it), also while it is written, and also from S3."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record
from pipeline.run.events import Event, Noted, Warned
from pipeline.run.log import FOLDER

_KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Event)}
_DRIVER = "driver-"  # how the name of a driver's log begins


@dataclass(frozen=True)
class LogLine(Record):
    """A line of a log; what it lacks is None. `time` is in UTC, as ISO 8601 has it."""

    time: str = ""
    level: str = "INFO"
    fence: int | None = None
    rank: int | None = None
    attempt: int | None = None
    step: int | None = None
    event: str | None = None
    message: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def told(self) -> Event | None:
        """The event that the line tells of; None for a line of another kind, or of another version of secateur."""
        kind = _KINDS.get(self.event or "")
        if kind in (Warned, Noted):
            return kind(self.message or "")
        if kind is None:
            return None
        values = self.data if self.step is None else {**self.data, "step": self.step}
        try:
            return kind.from_json(values, "a line of a log")
        except UserError:
            return None

    @property
    def seconds(self) -> float | None:
        """When it was written, in seconds since 1970."""
        try:
            return datetime.fromisoformat(self.time).timestamp()
        except ValueError:
            return None


class LogLines:
    """The lines of a run's log that came since they were asked for last. `driver` takes those of its driver alone."""

    def __init__(self, run_dir: str | Path, driver: bool = False) -> None:
        self._run_dir, self._folder, self._driver = run_dir, storage.join(run_dir, FOLDER), driver
        self._read: dict[str, int] = {}  # bytes of each file that are behind us

    def new(self) -> list[LogLine]:
        """The lines that have come, of all files, in the order of time. One that is not whole yet comes later.

        Raises UserError where a file of the log is a link out of the run.
        """
        found = storage.stats(self._folder)
        names = [name for name in found if name.endswith(".jsonl") and (name.startswith(_DRIVER) or not self._driver)]
        grown = [name for name in names if found[name].bytes > self._read.get(name, 0)]
        storage.require_inside(self._run_dir, [f"{FOLDER}/{name}" for name in grown])
        lines = [line for name in grown for line in self._more(name)]
        return sorted(lines, key=lambda line: line.time)

    def _more(self, name: str) -> list[LogLine]:
        start = self._read.get(name, 0)
        with storage.open_range(storage.join(self._folder, name), start) as stream:
            whole = stream.read().rpartition(b"\n")[0]
        self._read[name] = start + len(whole) + bool(whole)
        return [line for text in whole.splitlines() if (line := _parsed(text)) is not None]


def _parsed(text: bytes) -> LogLine | None:
    """A line; None for one that is torn: a process was killed while it wrote."""
    try:
        return LogLine.from_json(json.loads(text), "a line of a log")
    except (ValueError, UserError):
        return None
