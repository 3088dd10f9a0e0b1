"""The contents of a run directory, read once and never written. Every part but `run.json` may still be missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record
from pipeline.run import course, lease, machines
from pipeline.run.course import Moment
from pipeline.run.events import Busy
from pipeline.run.records import (
    DataFacts,
    DenseMetrics,
    Ended,
    Histograms,
    LayerActivity,
    RoundMetrics,
    RoundPlan,
    RunFacts,
    Scan,
    StartFacts,
)
from pipeline.run.result import Result
from pipeline.settings.config import Config, load_begun
from pipeline.storage import Stat

R = TypeVar("R", bound=Record)

_FILES = (
    "run.json",
    "config.yaml",
    "data.json",
    "dense/metrics.json",
    "scan/scan.json",
    "rounds/control.json",
    "result.json",
    "test_looks.jsonl",
    "report.html",
)
_START = ("start.json", "plan.json", "metrics.json")
_ATTEMPT = re.compile(r"attempt-\d+")  # the record of one that was undone
_AFTER = re.compile(r"after-\d+\.json")  # the scan of a round's model


@dataclass(frozen=True)
class Round:
    """One attempt at a round. `metrics` is None while it is running; `folder` is its place in the run."""

    number: int
    attempt: int
    folder: str
    plan: RoundPlan | None
    metrics: RoundMetrics | None


@dataclass(frozen=True)
class Contents:
    """A run directory, parsed."""

    path: str
    run: RunFacts
    config_text: str
    config: Config
    data: DataFacts | None
    dense: DenseMetrics | None
    scan: Scan | None
    rounds: tuple[Round, ...]
    control: DenseMetrics | None
    start: StartFacts | None
    histograms: Histograms | None
    activity: tuple[LayerActivity, ...]
    result: Result | None
    looks: int
    course: tuple[Moment, ...]
    machines: tuple[Busy, ...]
    ended: Ended | None

    @property
    def finished_rounds(self) -> list[RoundMetrics]:
        """Metrics of the rounds that are done, undone attempts too, in order."""
        return [each.metrics for each in self.rounds if each.metrics is not None]

    @property
    def finished_ms(self) -> int:
        """When the last finished part ended, in milliseconds since 1970; the run's creation if no part is finished.

        Taken from what the files say and never from their modification times, which a copy changes.
        """
        parts = [part for part in (self.dense, *self.finished_rounds, self.control) if part is not None]
        latest = max([part.finished_ms for part in parts] + [self.run.created_ms])
        final = (self.result.seconds.final if self.result is not None else None) or 0.0
        return latest + round(1000 * final)


def read(run_dir: str | Path) -> Contents:
    """Parse a run directory.

    Raises UserError if it is not one, or if a file in it is damaged.
    """

    def parsed(kind: type[R], *parts: str) -> R | None:
        return _record(kind, storage.join(run_dir, *parts))

    run = parsed(RunFacts, "run.json")
    if run is None:
        raise UserError(f"'{run_dir}' is not a run: it has no run.json; name a folder under runs_dir")
    config, activity = (storage.join(run_dir, name) for name in ("config.yaml", "final/activity.json"))
    config_text = _text(config)
    if config_text is None:
        raise UserError(f"run '{run_dir}' has no config.yaml; start it again with the command that made it")
    looks = _text(storage.join(run_dir, "test_looks.jsonl")) or ""
    return Contents(
        path=str(run_dir),
        run=run,
        config_text=config_text,
        config=load_begun(config),
        data=parsed(DataFacts, "data.json"),
        dense=parsed(DenseMetrics, "dense", "metrics.json"),
        scan=parsed(Scan, "scan", "scan.json"),
        rounds=tuple(_rounds(storage.join(run_dir, "rounds"))),
        control=parsed(DenseMetrics, "rounds", "control.json"),
        start=parsed(StartFacts, "start", "start.json"),
        histograms=parsed(Histograms, "final", "histograms.json"),
        activity=LayerActivity.all_from_json(_json(activity) or (), activity),
        result=parsed(Result, "result.json"),
        looks=sum(1 for line in looks.splitlines() if line),
        course=course.read(str(run_dir)),
        machines=machines.read(str(run_dir)),
        ended=_ended(str(run_dir)),
    )


def _ended(root: str) -> Ended | None:
    """How the run's last process ended before the run did; None where it still works, or nothing is known."""
    url = storage.join(root, "ended.json")
    known = _record(Ended, url)
    if known is None and lease.over(root):
        return Ended("killed", "its process is gone", 0)
    return known


def journals_version(run_dir: str | Path) -> str:
    """What changes when the journal of the course, or of the machines, has grown."""
    folders = (storage.join(run_dir, name) for name in (course.FOLDER, machines.FOLDER))
    return repr([sorted((name, stat.version) for name, stat in storage.stats(folder).items()) for folder in folders])


def mirrored_files(run_dir: str | Path) -> dict[str, Stat]:
    """The files in a run directory that describe the run, by their path within it: no shards, no checkpoints.

    Raises UserError where one of them is a link to a file elsewhere: what is mirrored is shown to others.
    """
    found: dict[str, Stat] = {}
    for folder in ("", "dense", "scan", "rounds"):
        there = storage.stats(storage.join(run_dir, folder))
        found |= {name: there[PurePosixPath(name).name] for name in _FILES if _is_in(name, folder, there)}
    for folder in _attempts(storage.join(run_dir, "rounds")):
        there = storage.stats(storage.join(run_dir, "rounds", folder))
        found |= {f"rounds/{folder}/{name}": there[name] for name in ("plan.json", "metrics.json") if name in there}
    start = storage.stats(storage.join(run_dir, "start"))
    found |= {f"start/{name}": start[name] for name in _START if name in start}
    scans = storage.stats(storage.join(run_dir, "scan"))
    found |= {f"scan/{name}": known for name, known in scans.items() if _AFTER.fullmatch(name)}
    final = storage.stats(storage.join(run_dir, "final"))
    found |= {f"final/{name}": known for name, known in final.items() if not name.endswith(".tmp")}
    storage.require_inside(run_dir, found)
    return found


def _is_in(path: str, folder: str, there: dict[str, Stat]) -> bool:
    place = PurePosixPath(path)
    return str(place.parent) == (folder or ".") and place.name in there


def _attempts(folder: str) -> Iterator[str]:
    """The folders of rounds, relative to `folder`; before each round, the folders of its undone attempts."""
    for part in sorted((name for name in storage.list_folders(folder) if name.isdigit()), key=int):
        undone = [name for name in storage.list_folders(storage.join(folder, part)) if _ATTEMPT.fullmatch(name)]
        yield from (f"{part}/{name}" for name in sorted(undone, key=lambda name: int(name.split("-")[1])))
        yield part


def _rounds(folder: str) -> Iterator[Round]:
    seen: set[tuple[int, int]] = set()
    for part in _attempts(folder):
        plan = _record(RoundPlan, storage.join(folder, part, "plan.json"))
        metrics = _record(RoundMetrics, storage.join(folder, part, "metrics.json"))
        if plan is not None and metrics is not None and plan.attempt != metrics.attempt:
            metrics = None  # left from the attempt before this one
        known = metrics or plan
        if known is not None:
            if (known.round, known.attempt) not in seen:  # one that is being undone is in two places
                yield Round(known.round, known.attempt, f"rounds/{part}", plan, metrics)
            seen.add((known.round, known.attempt))


def _record(kind: type[R], url: str) -> R | None:
    document = _json(url)
    return None if document is None else kind.from_json(document, url)


def _json(url: str) -> Any:
    text = _text(url)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"'{url}' is damaged ({error}); delete it and run the same command again") from error


def _text(url: str) -> str | None:
    """A file's text, or None where there is no file. Bytes that are not UTF-8 become replacement characters."""
    try:
        return storage.read_bytes(url).decode(errors="replace")
    except FileNotFoundError:
        return None
