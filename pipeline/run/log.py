"""A run's own log: JSON lines in RUN/log/, one file a process, kept when the cluster is gone.

A line has the keys time (UTC), level, run, uid, fence, rank, attempt, step, event and message; one that does not apply
is null. `data` has what else an event says, `error` a traceback. On a file system lines are appended. On S3, which
cannot append, they are sent as files of their own, NAME.000001.jsonl and on: every SECATEUR_LOG_SECONDS, less often the
older the process is, soon after a warning, and at the end.

Whatever goes wrong with a log, the run goes on: the user is told once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pipeline import storage
from pipeline.base.environment import number
from pipeline.base.errors import Leaving, UserError
from pipeline.base.hiding import hide
from pipeline.run import journal
from pipeline.run.events import Event, Noted, Paced, Progress, Warned
from pipeline.run.records import RunFacts
from pipeline.run.state import Run

FOLDER = "log"
MOST_WAITING = 4 * 2**20  # characters that wait for a store; beyond them the oldest lines are dropped
CLOSING_S = 20.0  # how long the end of a process waits for its last lines to be sent
LONGEST_S = 300.0  # between two files that are sent to S3, where a process has been at work for hours
PACED_EVERY_S = 60.0  # between two lines on how fast a rank is


def segment_s() -> float:
    """Seconds at least between two files that are sent to S3; the last ones are lost with a process that is killed."""
    return number("SECATEUR_LOG_SECONDS", 30)


class JsonLines(logging.Formatter):
    """A log record as one line of JSON, without secrets of URLs. `context` is what all lines of a process share."""

    def __init__(self, context: Mapping[str, object]) -> None:
        super().__init__()
        self.context = context

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, object] = dict(getattr(record, "data", {}))
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self.context,
            "step": data.pop("step", None),
            "event": getattr(record, "event", None),
            "message": record.getMessage() or None,
        }
        if data:
            line["data"] = data
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(_clean(line), ensure_ascii=False, allow_nan=False)


def _clean(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite as text, and texts without secrets."""
    if isinstance(value, dict):
        return {str(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    if isinstance(value, str):
        return hide(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return hide(str(value))


class _Kept(logging.Handler):
    """Keeps lines, and tells the first problem in a row to `tell`."""

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.url, self.tell, self.sound = url, tell, True

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.keep(self.format(record) + "\n", record.levelno)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong with a log, the run must not end by it
            self.failed(error)

    def keep(self, line: str, level: int) -> None:
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """Tell that lines are lost; once, until one is kept again."""
        told, self.sound = not self.sound, False
        if not told:
            self.tell(f"the log '{self.url}' cannot be written ({error or type(error).__name__}); the run goes on")


class _Appended(_Kept):
    """Appends to a local file, which any number of readers may follow."""

    def keep(self, line: str, level: int) -> None:
        path = storage.local_path(self.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(line.encode())
        self.sound = True


class _Sent(_Kept):
    """Sends what came since the last time as a file of its own, from a thread, so that no store delays the run."""

    def __init__(self, url: str, tell: Callable[[str], None]) -> None:
        super().__init__(url, tell)
        self.waiting: deque[str] = deque()
        self.size = self.dropped = self.sent = 0
        self._state = threading.Condition()
        self._closing = self._urgent = False
        self._every, self._began = segment_s(), time.monotonic()
        self._thread = threading.Thread(target=self._work, name="run-log", daemon=True)
        self._thread.start()

    def keep(self, line: str, level: int) -> None:
        with self._state:
            self.waiting.append(line)
            self.size += len(line)
            self._drop()
            if level >= logging.WARNING:
                self._urgent = True
                self._state.notify_all()

    def _drop(self) -> None:
        """Drop the oldest lines where too many wait."""
        while self.size > MOST_WAITING:
            self.size -= len(self.waiting.popleft())
            self.dropped += 1

    def close(self) -> None:
        """Send what is left, for CLOSING_S at most."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join(CLOSING_S)
        if self._thread.is_alive():
            self.failed(TimeoutError(f"its store took more than {CLOSING_S:.0f} s at the end"))
        super().close()

    def _work(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closing, self._every)
                longer = max(0.0, journal.lazy_s(self._began, LONGEST_S) - self._every)
                self._state.wait_for(lambda: self._closing or self._urgent, longer)
                closing = self._closing
            self._send()
            if closing:
                return

    def _send(self) -> None:
        """Send the lines that wait. Those that cannot be sent wait on."""
        with self._state:
            lines, dropped = self.waiting, self.dropped
            self.waiting, self.size, self.dropped, self._urgent = deque(), 0, 0, False
        if not lines:
            return
        lost = [json.dumps({"level": "WARNING", "message": f"{dropped} lines before these were dropped"}) + "\n"]
        stem = self.url.removesuffix(".jsonl")
        try:
            storage.write_bytes(f"{stem}.{self.sent + 1:06d}.jsonl", "".join([*lost[: bool(dropped)], *lines]).encode())
        except Exception as error:  # noqa: BLE001 - whatever goes wrong with a log, the run must not end by it
            self.failed(error)
            with self._state:
                self.waiting.extendleft(reversed(lines))
                self.size, self.dropped = sum(map(len, self.waiting)), self.dropped + dropped
                self._drop()
                self._urgent = True
            return
        self.sent, self.sound = self.sent + 1, True


class RunLog:
    """The log of one process. Called with an event, it writes a line."""

    def __init__(self, url: str, context: Mapping[str, object], tell: Callable[[str], None]) -> None:
        self._handler: _Kept = (_Appended if storage.is_local(url) else _Sent)(url, tell)
        self._handler.setFormatter(JsonLines(context))
        # Not one of logging's register: that would keep it for good, and its parents would print its lines too.
        self.logger = logging.Logger("secateur.run", logging.DEBUG)
        self.logger.addHandler(self._handler)
        self._paced: dict[int, tuple[str, float]] = {}  # of each rank the phase of its last such line, and when

    def __call__(self, event: Event) -> None:
        """Write an event; how fast a rank is within a phase every PACED_EVERY_S only."""
        if isinstance(event, Paced) and not self._due(event):
            return
        name = type(event).__name__
        if isinstance(event, Warned | Noted):
            level = logging.WARNING if isinstance(event, Warned) else logging.INFO
            self.logger.log(level, "%s", event.text, extra={"event": name})
        else:
            self.logger.info("", extra={"event": name, "data": dataclasses.asdict(event)})

    def _due(self, event: Paced) -> bool:
        phase, last = self._paced.get(event.rank, ("", 0.0))
        now = time.monotonic()
        if phase == event.phase and now - last < PACED_EVERY_S:
            return False
        self._paced[event.rank] = event.phase, now
        return True

    def hearing(self, progress: Progress, without: tuple[type, ...] = ()) -> Progress:
        """A progress function that hands each event on, and writes it if it is not of the kinds `without`."""

        def heard(event: Event) -> None:
            if not isinstance(event, without):
                self(event)
            progress(event)

        return heard

    def ended(self, error: BaseException | None) -> None:
        """Write how the process ended. The traceback of what nobody foresaw is written too."""
        if error is None:
            self.logger.info("ended well", extra={"event": "Ended"})
            return
        level = logging.WARNING if isinstance(error, Leaving | KeyboardInterrupt | SystemExit) else logging.ERROR
        self.logger.log(
            level,
            "%s",
            f"ended by {type(error).__name__}: {error}",
            extra={"event": "Ended"},
            exc_info=error if level == logging.ERROR and not isinstance(error, UserError) else None,
        )

    def close(self) -> None:
        """Bring the last lines to their place."""
        self._handler.close()


@contextmanager
def kept(
    run: Run, name: str, tell: Callable[[str], None], rank: int | None = None, attempt: int | None = None
) -> Iterator[RunLog]:
    """The log RUN/log/NAME.jsonl of this process while the block lasts; how the block ends is its last line.

    Python's warnings are written too. `tell` is told if lines cannot be kept. Raises nothing of its own.
    """
    context = {"run": run.root, "uid": _uid(run), "fence": run.fence, "rank": rank, "attempt": attempt}
    log = RunLog(run.path(FOLDER, f"{name}.jsonl"), context, tell)
    show = warnings.showwarning

    def showwarning(message: Warning | str, *given: Any, **options: Any) -> None:
        log.logger.warning("%s", message, extra={"event": "Warned"})
        show(message, *given, **options)

    warnings.showwarning = showwarning
    ended: BaseException | None = None
    try:
        yield log
    except BaseException as error:
        ended = error
        raise
    finally:
        warnings.showwarning = show
        log.ended(ended)
        log.close()


def _uid(run: Run) -> str | None:
    """The run's own number, which its name in another folder may share with none; None where it cannot be read."""
    try:
        return run.load(RunFacts, "run.json").uid
    except (UserError, OSError):
        return None


def driver_name(run: Run) -> str:
    """Name of the log of the process that drives a run: one for each lease."""
    return f"driver-{run.fence:04d}"


def rank_name(run: Run, stage: str, attempt: int, rank: int) -> str:
    """Name of the log of a rank within a stage; `attempt` counts the starts of its worker group."""
    return f"{run.fence:04d}-{stage}-{attempt}-rank-{rank}"
