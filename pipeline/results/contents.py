"""What a run directory holds, read once and read only; every part but `run.json` may still be missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

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


@dataclass(frozen=True)
class Round:
    """One round's folder. `metrics` is None while the round is running."""

    number: int
    attempt: int
    plan: Json | None
    metrics: Json | None


@dataclass(frozen=True)
class Contents:
    """A run directory, parsed. Shapes are those that `cluster/stages.py` and `pipeline/rounds.py` write."""

    path: Path
    run: Json
    config_text: str
    config: Json
    data: Json | None
    dense: Json | None
    scan: Json | None
    rounds: tuple[Round, ...]
    control: Json | None
    histograms: Json | None
    activity: tuple[Json, ...]
    result: Json | None
    looks: int

    @property
    def finished_rounds(self) -> list[Json]:
        """Metrics of the rounds that are done, in order."""
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


def read(run_dir: Path | str) -> Contents:
    """Read a run directory.

    Raises UserError if it is not one, or if a file in it is damaged.
    """
    run_dir = Path(run_dir)
    run = _json(run_dir / "run.json")
    if run is None:
        raise UserError(f"'{run_dir}' is not a run: it has no run.json; name a folder under runs_dir")
    config_file = run_dir / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"run '{run_dir}' has no config.yaml; start it again with the command that made it")
    config_text = config_file.read_text(encoding="utf-8")
    looks = run_dir / "test_looks.jsonl"
    return Contents(
        path=run_dir,
        run=run,
        config_text=config_text,
        config=yaml.safe_load(config_text) or {},
        data=_json(run_dir / "data.json"),
        dense=_json(run_dir / "dense" / "metrics.json"),
        scan=_json(run_dir / "scan" / "scan.json"),
        rounds=tuple(_rounds(run_dir / "rounds")),
        control=_json(run_dir / "rounds" / "control.json"),
        histograms=_json(run_dir / "final" / "histograms.json"),
        activity=tuple(_json(run_dir / "final" / "activity.json") or ()),
        result=_json(run_dir / "result.json"),
        looks=sum(1 for line in looks.read_text(encoding="utf-8").splitlines() if line) if looks.is_file() else 0,
    )


def mirrored_files(run_dir: Path) -> list[str]:
    """Paths in a run directory, relative to it, that describe the run: no shards, no checkpoints."""
    found = [name for name in _FILES if (run_dir / name).is_file()]
    for pattern in ("scan/after-[0-9]*[0-9].json", "rounds/*/plan.json", "rounds/*/metrics.json", "final/*"):
        found += sorted(str(p.relative_to(run_dir)) for p in run_dir.glob(pattern) if p.is_file() and _whole(p))
    return found


def _whole(path: Path) -> bool:
    """Not a file that is being written under a temporary name."""
    return not path.name.startswith(".") and path.suffix != ".tmp"


def _rounds(folder: Path) -> Iterator[Round]:
    for part in sorted((p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name)):
        plan, metrics = _json(part / "plan.json"), _json(part / "metrics.json")
        if plan is not None and metrics is not None and plan.get("attempt", 1) != metrics.get("attempt", 1):
            metrics = None  # left from the attempt before this one
        known = metrics or plan
        if known is not None:
            yield Round(int(known["round"]), int(known.get("attempt") or 1), plan, metrics)


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error}); delete it and run the same command again") from error
