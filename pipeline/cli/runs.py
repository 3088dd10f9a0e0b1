"""`secateur list`: the runs of a folder, a line each. It loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record, plain
from pipeline.results.words import moment, number
from pipeline.run import lease
from pipeline.run.records import RunFacts
from pipeline.run.result import Result
from pipeline.run.state import MARKER, Run
from pipeline.settings.config import load_begun

DEEPEST = 3  # levels of folders below runs_dir in which runs are looked for, as reproduce/lenet-5/seed-0
FINISHED = "finished"
STAGES = ("shards", "latency", "dense", "scan", "rounds", "final")
NOT_ALWAYS = ("latency", "scan")  # stages that some runs have


@dataclass(frozen=True)
class Row(Record):
    """A run in few words. `stage` is the one that it stands in, or `finished`; `when_ms` its last sign of life.

    `problem` says why the rest is not known, where its folder is damaged.
    """

    name: str
    path: str
    network: str | None = None
    stage: str | None = None
    running: bool = False
    compression: float | None = None
    verdict: str | None = None
    top1: float | None = None
    when_ms: int | None = None
    problem: str | None = None


def show(runs_dir: str, as_json: bool) -> None:
    """Print the runs below a folder, the newest last. Raises UserError where there is none."""
    rows = sorted(map(row, find(runs_dir)), key=lambda each: each.when_ms or 0)
    if not rows:
        raise UserError(f"'{runs_dir}' holds no run: give the runs_dir of your runs, as in `secateur list runs`")
    if as_json:
        print(json.dumps(plain(rows), indent=1))
        return
    print_rows([("run", "network", "stage", "compression", "verdict", "test error", "when"), *map(_cells, rows)])
    for each in rows:
        if each.problem:
            print(f"warning: {each.problem}")


def find(folder: str, depth: int = DEEPEST) -> Iterator[str]:
    """The folders of runs below a folder; within a run none is looked for."""
    for name in storage.list_folders(folder):
        below = storage.join(folder, name)
        if name.startswith(".") or name == "mlartifacts":  # MLflow's copies of files, beside its sqlite file
            continue
        if storage.exists(storage.join(below, "run.json")):
            yield below
        elif depth > 1:
            yield from find(below, depth - 1)


def row(root: str) -> Row:
    """What a run's folder says; a damaged one gives a row that says so."""
    run, name = Run(root, 0), root.rstrip("/").rpartition("/")[2]
    try:
        facts = run.load(RunFacts, "run.json")
        network = load_begun(run.path("config.yaml")).model.factory
        held = lease.holder(root) is not None
        if run.has("result.json"):
            found = run.load(Result, "result.json")
            return Row(
                name, root, network, FINISHED, held, found.compression, found.verdict, found.test.pruned.top1,
                last_ms(run) or facts.created_ms,
            )  # fmt: skip
        return Row(name, root, network, stage(run), held, when_ms=last_ms(run) or facts.created_ms)
    except (UserError, OSError) as error:
        return Row(name, root, problem=str(error))


def stage(run: Run) -> str:
    """The stage that a run stands in: the first without its marker. Those of NOT_ALWAYS only where they have begun."""
    for name in STAGES:
        if run.has(name, MARKER):
            continue
        begun = name not in NOT_ALWAYS or storage.list_folders(run.path(name)) or storage.list_files(run.path(name))
        if begun:
            return name
    return FINISHED


def last_ms(run: Run) -> int | None:
    """When the last finished stage ended, in milliseconds since 1970."""
    found = [marker.finished_ms for name in STAGES if (marker := run.marker(name)) is not None]
    return max(found, default=None)


def _cells(each: Row) -> tuple[str, ...]:
    return (
        each.name,
        each.network or "?",
        "damaged" if each.problem else f"{each.stage}{', running' if each.running else ''}",
        "" if each.compression is None else f"{number(each.compression)}×",
        each.verdict or "",
        "" if each.top1 is None else f"{100 * (1 - each.top1):.2f}%",
        "" if each.when_ms is None else moment(each.when_ms),
    )


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """Print rows of cells as columns, the first row being their heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
