"""A thread of the driver that keeps MLflow up to date while a run goes on, and never blocks or fails the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pipeline import storage
from pipeline.base.environment import number
from pipeline.base.errors import UserError
from pipeline.base.process import MIRROR_THREAD
from pipeline.run.contents import journals_version, mirrored_files
from pipeline.settings import trust
from pipeline.settings.config import Config
from pipeline.tracking import tracking
from pipeline.tracking.tracking import Synced

_LONGEST_WAIT = 60.0  # seconds between tries while the server is away
_POLL, _POLL_REMOTE = 2.0, 15.0  # seconds between looks at a run on disk, and at one on S3, where each is paid for
LAG_EVERY_S = 10.0  # between reports while MLflow lacks something
# After a sync so many times as long as it took, and at most so many seconds: it takes longer with each day of a run.
# And at most half as long as the thread has been there, since what a run begins with must be seen soon.
_REST, _LONGEST_REST = 20.0, 300.0


def patience_s() -> float:
    """How many seconds the end of a run waits for a tracking server."""
    return number("SECATEUR_MLFLOW_PATIENCE_S", 60)


class Mirror:
    """Calls `tracking.sync` when a file of the run has changed, and rests a while after each.

    A problem is reported once, through `on_problem`, until a sync works again. Syncs are retried at growing intervals,
    and nothing is raised into the run. `on_problem` is called from this thread, or from the caller of `close`; `on_lag`
    from this thread, every LAG_EVERY_S while MLflow lacks something, and when it lacks nothing.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: Config,
        on_problem: Callable[[str], None],
        on_lag: Callable[[float], None] = lambda lag: None,
        poll_seconds: float | None = None,
    ) -> None:
        self._run_dir, self._config, self._on_problem = run_dir, config, on_problem
        self._poll = poll_seconds or (_POLL if storage.is_local(run_dir) else _POLL_REMOTE)
        self._state = threading.Condition()
        self._asked = self._answered = 0  # syncs asked for by `flush`, and the last of them that was tried
        self._closing = False
        self._failed = False  # the last try
        self._problem = ""
        self._told = False  # that problem, through `on_problem`
        self._lacked = ""  # what MLflow did not take, and `on_problem` was told of
        self._latest: Synced | None = None
        self._on_lag = on_lag
        self._behind: float | None = None  # when a change was seen that MLflow still lacks
        self._lag: float | None = None  # what `on_lag` was told last
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._work, name=MIRROR_THREAD, daemon=True)
        self._thread.start()

    @property
    def latest(self) -> Synced | None:
        """Where the run stood in MLflow after the last sync that worked."""
        return self._latest

    def flush(self, timeout: float) -> Synced | None:
        """Sync now and wait for it, at most `timeout` seconds. None if it failed or took longer."""
        with self._state:
            self._asked += 1
            mine = self._asked
            self._state.notify_all()
            done = self._state.wait_for(lambda: self._answered >= mine or not self._thread.is_alive(), timeout)
            return self._latest if done and self._answered >= mine and not self._failed else None

    def close(self, timeout: float = 60.0) -> Synced | None:
        """A last sync, at most `timeout` seconds, and the end of the thread.

        None if MLflow could not be brought up to date; `on_problem` then names the command that does.
        """
        with self._state:
            self._closing = True
        synced = self.flush(timeout)
        if synced is None:
            why = "" if self._told else f" ({self._problem or 'the server is too slow'})"
            server = f" --uri {self._config.tracking.uri}" if trust.sent(self._config.tracking) else ""
            self._on_problem(
                f"MLflow does not hold all of this run{why}; when its server answers: secateur sync {self._run_dir}"
                f"{server}"
            )
        return synced

    def _work(self) -> None:
        seen: object = None
        failures = 0
        due = 0.0  # when a sync that failed is tried again
        rest = 0.0
        while True:
            with self._state:
                self._state.wait_for(lambda: self._asked > self._answered, max(self._poll, rest))
                asked, closing = self._asked, self._closing
            rest = 0.0
            now = self._fingerprint()
            requested = asked > self._answered
            if now and now != seen:
                self._tell_lag(True)
            if requested or (now and now != seen and time.monotonic() >= due):
                began = time.monotonic()
                if self._try():
                    seen, failures = now, 0
                    ended = time.monotonic()
                    rest = min(_LONGEST_REST, _REST * (ended - began), (ended - self._began) / 2)
                    self._tell_lag(False)
                else:
                    failures += 1
                    due = time.monotonic() + min(_LONGEST_WAIT, self._poll * 2**failures)
                    if not self._told and not requested:
                        self._told = True
                        self._on_problem(f"{self._problem}. The run goes on; MLflow is tried again from time to time")
            with self._state:
                self._answered = asked
                self._failed = failures > 0
                self._state.notify_all()
                if closing and asked >= self._asked:
                    return

    def _tell_lag(self, behind: bool) -> None:
        """Tell `on_lag` how long MLflow has lacked something, every LAG_EVERY_S; that it lacks nothing, once."""
        if not behind:
            self._behind = None
            if self._lag != 0:
                self._lag = 0.0
                self._on_lag(0.0)
            return
        now = time.monotonic()
        self._behind = now if self._behind is None else self._behind
        lag = now - self._behind
        if lag >= (self._lag or 0.0) + LAG_EVERY_S:
            self._lag = lag
            self._on_lag(round(lag, 3))

    def _try(self) -> bool:
        try:
            self._latest = tracking.sync(self._run_dir, self._config)
            if self._latest.lacks not in ("", self._lacked):
                self._lacked = self._latest.lacks
                self._on_problem(f"{self._lacked}. The rest of the run is there")
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in MLflow, the run must not end by it
            self._problem = f"MLflow: {error}" if str(error) else f"MLflow: {error!r}"
            return False
        self._problem, self._told = "", False
        return True

    def _fingerprint(self) -> tuple[tuple[str, str], ...]:
        """Name and version of each file that is mirrored; empty before the run directory is set up, or while the store
        is away, which the run itself meets and tells."""
        try:
            found = mirrored_files(self._run_dir)
            journals = journals_version(self._run_dir)
        except (UserError, OSError):
            return ()
        files = tuple((name, known.version) for name, known in found.items())
        return (*files, ("journals", journals)) if "run.json" in found else ()
