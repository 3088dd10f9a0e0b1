"""`secateur status`: where a run stands, what is left, and whether a process is at it. It loads no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record, plain
from pipeline.cli.progress import Tracker
from pipeline.cli.runs import FINISHED, NOT_ALWAYS, STAGES, last_ms, stage
from pipeline.results.words import duration, moment, number
from pipeline.run import ended, lease
from pipeline.run.layout import trail
from pipeline.run.log_lines import LogLines
from pipeline.run.records import Ended, RunFacts
from pipeline.run.result import Result
from pipeline.run.state import Run, now_ms
from pipeline.settings.config import load_begun


@dataclass(frozen=True)
class Status(Record):
    """Where a run stands. `rounds` is how many there are to be, where that is known; `accepted` of them are done.

    `doing` says what is done now, or was when the run stopped; `left_s` is about how many seconds are left of it all;
    `held_by` is the process that writes, None where nobody does. `ended` is how and why the last one ended too early.
    """

    name: str
    path: str
    network: str
    stage: str
    stages: tuple[str, ...]
    seconds: dict[str, float]
    accepted: int
    rounds: int | None
    doing: str | None
    left_s: float | None
    held_by: str | None
    heard_ms: int | None
    compression: float | None = None
    verdict: str | None = None
    ended: str | None = None


def of(run_dir: str) -> Status:
    """The status of a run. Raises UserError where the folder is none."""
    run = Run(run_dir, 0)
    if not run.has("run.json"):
        raise UserError(f"'{run_dir}' is not a run: it has no run.json; `secateur list` shows those of a folder")
    facts, config = run.load(RunFacts, "run.json"), load_begun(run.path("config.yaml"))
    storage.require_closed(run_dir)
    tracker, heard = Tracker(), None
    for line in LogLines(run_dir, driver=True).new():
        event, when = line.told, line.seconds
        heard = when or heard
        if event is not None and when is not None:
            tracker(event, when)
    result = run.load(Result, "result.json") if run.has("result.json") else None
    at = FINISHED if result else stage(run)
    markers = {name: marker.seconds for name in STAGES if (marker := run.marker(name)) is not None}
    known = max(last_ms(run) or facts.created_ms, round(1000 * (heard or 0)))
    return Status(
        name=facts.name,
        path=run_dir,
        network=config.model.factory,
        stage=at,
        stages=tracker.stages or tuple(name for name in STAGES if name not in NOT_ALWAYS or name in (at, *markers)),
        seconds=markers,
        accepted=sum(metrics.accepted for metrics in trail(run)),
        rounds=tracker.rounds,
        doing=None if result else tracker.doing or None,
        left_s=None if result else tracker.left_s,
        held_by=lease.holder(run_dir),
        heard_ms=known,
        compression=result.compression if result else None,
        verdict=result.verdict if result else None,
        ended=_ended(run),
    )


def _ended(run: Run) -> str | None:
    if not run.has(ended.FILE):
        return None
    last = run.load(Ended, ended.FILE)
    kind, found, why = last.why.partition(": ")  # the error's class, which says little to people
    return f"{last.how}: {why if found and kind.isidentifier() else last.why}"


def show(run_dir: str, as_json: bool) -> None:
    """Print a run's status."""
    found = of(run_dir)
    if as_json:
        print(json.dumps(plain(found), indent=1))
        return
    for line in lines(found):
        print(line)


def lines(found: Status) -> list[str]:
    """A status in a few lines."""
    said = [f"{found.name} ({found.network}), {found.path}"]
    for name in found.stages:
        done = found.seconds.get(name)
        text = f"done in {duration(done)}" if done is not None else "to do"
        if name == found.stage:
            text = "now" if found.held_by else "stopped here"
        if name == "rounds" and (found.accepted or name == found.stage):
            of = f" of {found.rounds}" if found.rounds else ""
            text += f": {found.accepted}{of} rounds done"
        said.append(f"  {name:<7} {text}")
    if found.doing:
        said.append(f"{'now' if found.held_by else 'last'}: {found.doing}")
    if found.left_s is not None:
        said.append(f"left: about {duration(found.left_s)} at the pace so far")
    if found.verdict is not None:
        said.append(f"verdict: {found.verdict} at {number(found.compression)}×")
    if found.ended and not found.held_by and not found.verdict:
        said.append(f"the last process {found.ended}")
    at_it = found.held_by or ("nobody" if found.verdict else "nobody; the command that started it goes on")
    said.append(f"at it: {at_it}")
    if found.heard_ms is not None:
        ago = duration(max(0.0, round((now_ms() - found.heard_ms) / 1000)))
        said.append(f"last sign of life: {moment(found.heard_ms)}, {ago} ago")
    return said
