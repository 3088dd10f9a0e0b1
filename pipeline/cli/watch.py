"""`secateur watch` and `secateur logs`: a run's own log, followed from any machine that sees its folder."""

from __future__ import annotations

import json
import time

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import plain
from pipeline.cli import status
from pipeline.cli.display import Display, said
from pipeline.cli.messages import INTERRUPTED, PASSING, Told
from pipeline.cli.runs import FINISHED
from pipeline.run import lease
from pipeline.run.log_lines import LogLine, LogLines

LOOK_S, LOOK_REMOTE_S = 1.0, 15.0  # between looks at a run on disk, and at one on S3, where each is paid for


def watch(run_dir: str) -> int:
    """Follow a run to its end; returns 0 where it is finished, and PASSING where it stopped before that.

    Raises UserError where the folder is no run.
    """
    try:
        return _watch(run_dir)
    except KeyboardInterrupt as error:
        print(f"no longer watching '{run_dir}'; the run is not touched")
        raise Told(INTERRUPTED) from error


def _watch(run_dir: str) -> int:
    found = status.of(run_dir)
    log = LogLines(run_dir, driver=True)
    for text in status.lines(found):
        print(text, flush=True)
    if found.held_by is not None:
        with Display() as display:
            for line in log.new():  # what was before; it is not shown again
                _take(line, display, shown=False)
            held: str | None = found.held_by
            while held is not None:
                held = lease.holder(run_dir)  # asked before the log, which is then whole
                for line in log.new():
                    _take(line, display, shown=True)
                time.sleep(_pause(run_dir) if held is not None else 0)
        found = status.of(run_dir)
    if found.stage != FINISHED:
        print("nobody is at the run: the command that started it goes on")
        return PASSING
    print(f"finished: {found.verdict} at {found.compression:.4g}×; `secateur report {run_dir}` writes its report again")
    return 0


def _take(line: LogLine, display: Display, shown: bool) -> None:
    event, when = line.told, line.seconds
    if event is not None and when is not None:
        display.heard(event, when, shown)
    elif shown and line.message:
        display.line(line.message)


def print_log(run_dir: str, follow: bool, as_json: bool) -> None:
    """Print the lines of a run's log; with `follow` until nobody is at the run. Raises UserError for no run."""
    log = LogLines(run_dir)
    lines = log.new()
    if not lines and not storage.exists(storage.join(run_dir, "run.json")):
        raise UserError(f"'{run_dir}' is not a run: it has no run.json; `secateur list` shows those of a folder")
    held = True
    while True:
        for line in lines:
            if text := (json.dumps(plain(line), ensure_ascii=False) if as_json else sentence(line)):
                print(text, flush=True)
        if not follow or not held:
            return
        time.sleep(_pause(run_dir))
        held = lease.holder(run_dir) is not None  # asked before the log, which is then whole
        lines = log.new()


def sentence(line: LogLine) -> str:
    """A line for people: time, who, what; empty for what only gauges ask for."""
    event = line.told
    text = said(event) if event is not None else (line.message or line.event or "")
    if not text:
        return ""
    who = "driver" if line.rank is None else f"rank {line.rank}"
    level = "" if line.level in ("INFO", "WARNING") else f" {line.level}"
    error = f"\n{line.error}" if line.error else ""
    return f"{line.time} {who}{level}: {text}{error}"


def _pause(run_dir: str) -> float:
    return LOOK_S if storage.is_local(run_dir) else LOOK_REMOTE_S
