"""What a run directory holds, read once and read only; every part but `run.json` may still be missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.run.records import Scan
from pipeline.storage import Stat

Json = dict[str, Any]

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
    plan: Json | None
    metrics: Json | None


@dataclass(frozen=True)
class Contents:
    """A run directory, parsed. Shapes are those that `pipeline/stages.py` and `pipeline/rounds/` write."""

    path: str
    run: Json
    config_text: str
    config: Json
    data: Json | None
    dense: Json | None
    scan: Scan | None
    rounds: tuple[Round, ...]
    control: Json | None
    start: Json | None
    histograms: Json | None
    activity: tuple[Json, ...]
    result: Json | None
    looks: int

    @property
    def finished_rounds(self) -> list[Json]:
        """Metrics of the rounds that are done, undone attempts too, in order."""
        return [each.metrics for each in self.rounds if each.metrics is not None]

    @property
    def finished_ms(self) -> int:
        """When the last finished part ended, in milliseconds since 1970; the creation where none has.

        Taken from what the files say and never from their modification times, which a copy changes.
        """
        parts = [part for part in (self.dense, *self.finished_rounds, self.control) if part is not None]
        latest = max([int(part.get("finished_ms") or 0) for part in parts] + [int(self.run["created_ms"])])
        final = ((self.result or {}).get("seconds") or {}).get("final") or 0.0
        return latest + round(1000 * final)


def read(run_dir: str | Path) -> Contents:
    """Read a run directory.

    Raises UserError if it is not one, or if a file in it is damaged.
    """

    def parsed(*parts: str) -> Any:
        return _json(storage.join(run_dir, *parts))

    run = parsed("run.json")
    if run is None:
        raise UserError(f"'{run_dir}' is not a run: it has no run.json; name a folder under runs_dir")
    config = _text(storage.join(run_dir, "config.yaml"))
    if config is None:
        raise UserError(f"run '{run_dir}' has no config.yaml; start it again with the command that made it")
    scan = parsed("scan", "scan.json")
    looks = _text(storage.join(run_dir, "test_looks.jsonl")) or ""
    return Contents(
        path=str(run_dir),
        run=run,
        config_text=config,
        config=yaml.safe_load(config) or {},
        data=parsed("data.json"),
        dense=parsed("dense", "metrics.json"),
        scan=None if scan is None else Scan.from_json(scan, storage.join(run_dir, "scan", "scan.json")),
        rounds=tuple(_rounds(storage.join(run_dir, "rounds"))),
        control=parsed("rounds", "control.json"),
        start=parsed("start", "start.json"),
        histograms=parsed("final", "histograms.json"),
        activity=tuple(parsed("final", "activity.json") or ()),
        result=parsed("result.json"),
        looks=sum(1 for line in looks.splitlines() if line),
    )


def mirrored_files(run_dir: str | Path) -> dict[str, Stat]:
    """The files in a run directory that describe the run, by their path within it: no shards, no checkpoints."""
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
    return found | {f"final/{name}": known for name, known in final.items() if not name.endswith(".tmp")}


def _is_in(path: str, folder: str, there: dict[str, Stat]) -> bool:
    place = PurePosixPath(path)
    return str(place.parent) == (folder or ".") and place.name in there


def _attempts(folder: str) -> Iterator[str]:
    """The folders of rounds and, before each, of its attempts that were undone, relative to `folder`."""
    for part in sorted((name for name in storage.list_folders(folder) if name.isdigit()), key=int):
        undone = [name for name in storage.list_folders(storage.join(folder, part)) if _ATTEMPT.fullmatch(name)]
        yield from (f"{part}/{name}" for name in sorted(undone, key=lambda name: int(name.split("-")[1])))
        yield part


def _rounds(folder: str) -> Iterator[Round]:
    seen: set[tuple[int, int]] = set()
    for part in _attempts(folder):
        plan, metrics = (_json(storage.join(folder, part, name)) for name in ("plan.json", "metrics.json"))
        if plan is not None and metrics is not None and plan.get("attempt", 1) != metrics.get("attempt", 1):
            metrics = None  # left from the attempt before this one
        known = metrics or plan
        if known is not None:
            number, attempt = int(known["round"]), int(known.get("attempt") or 1)
            if (number, attempt) not in seen:  # one that is being undone is in two places
                yield Round(number, attempt, f"rounds/{part}", plan, metrics)
            seen.add((number, attempt))


def _json(url: str) -> Any:
    text = _text(url)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"'{url}' is damaged ({error}); delete it and run the same command again") from error


def _text(url: str) -> str | None:
    """A file's text, or None where there is none. A damaged one comes back with marks where it is."""
    try:
        return storage.read_bytes(url).decode(errors="replace")
    except FileNotFoundError:
        return None
