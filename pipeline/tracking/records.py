"""What MLflow should hold for a run, derived from the run directory alone. Nothing here talks to a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.base.hiding import hide
from pipeline.results import worth
from pipeline.results.words import number
from pipeline.run.contents import Contents, Round, mirrored_files
from pipeline.run.events import Busy
from pipeline.run.records import WeightHistogram
from pipeline.settings.config import Config, flatten
from pipeline.tracking import artifacts, curves, networks, notes
from pipeline.tracking.artifacts import Artifact, figure, table
from pipeline.tracking.curves import Point
from pipeline.tracking.networks import UID, Model

MAX_PARAM, MAX_TAG, MAX_KEY = 6000, 4000, 250  # characters that MLflow takes
KIND, ROUND, ATTEMPT = "secateur.kind", "secateur.round", "secateur.attempt"
MADE_BY = "secateur.version"  # of the program that began the run, or made its result
PARENT = "secateur.parent_run"  # the MLflow run of the run that this one branched off from


@dataclass(frozen=True)
class DataSet:
    """A split of the run's data. `source` is a path or URL, None for what an installed package holds."""

    split: str
    name: str
    digest: str
    source: str | None
    samples: int


@dataclass(frozen=True)
class MlflowRun:
    """One MLflow run as it should be. `identity` are the tags it is found by.

    `{run_id}` in the note stands for the MLflow run itself.
    """

    name: str
    identity: dict[str, str]
    tags: dict[str, str]
    params: dict[str, str]
    points: tuple[Point, ...]
    artifacts: tuple[Artifact, ...]
    start_ms: int
    status: str  # RUNNING, FINISHED, KILLED or FAILED
    end_ms: int | None  # None while it is running
    tables: tuple[str, ...] = ()
    note: str = ""
    data: tuple[DataSet, ...] = ()
    model: Model | None = None
    machines: tuple[Busy, ...] = ()  # lines that only come behind each other: points are made of new ones alone


def parent(run: Contents, config: Config) -> MlflowRun:
    """The run itself: settings, the course of the rounds, the final numbers, and every file worth keeping."""
    result = run.result
    tags = {"network": config.model.factory, "data": _data_name(config)}
    if result is not None:
        tags |= {"verdict": result.verdict, "compression": f"{number(result.compression)}×"}
    if run.start is not None:
        begun = {"run": run.start.run, "uid": run.start.uid, "round": str(run.start.round)}
        tags |= {f"secateur.source_{key}": value for key, value in begun.items()}
        tags |= {PARENT: run.start.mlflow_run_id} if run.start.mlflow_run_id else {}
    if run.ended is not None and result is None:
        tags |= {"ended by": run.ended.why}
    parts = {busy.node: busy.parts for busy in run.machines}
    tags |= {"machines": _cut("; ".join(f"{node}: {held}" for node, held in parts.items()), MAX_TAG)} if parts else {}
    made_by = run.run.version if result is None else result.versions.get("secateur")
    tags |= {MADE_BY: made_by} if made_by is not None else {}
    drawn = [table("layers.json", result.layers)] if result is not None else []
    points = tuple(curves.of_run(run))
    status = _status(run, result is not None)
    return MlflowRun(
        name=_name(run),
        identity={UID: run.run.uid, KIND: "run"},
        tags=tags,
        params={_key(name): _cut(_text(value)) for name, value in flatten(config).items()},
        points=points,
        artifacts=(*_files(run, _of_the_run), *drawn, *_figures(run)),
        start_ms=run.run.created_ms,
        status=status,
        end_ms=None if status == "RUNNING" else _ended_ms(run),
        tables=tuple(each.path for each in drawn),
        note=notes.of_run(run),
        data=tuple(_data(run, config)),
        model=networks.final(run, config, points),
        machines=run.machines,
    )


def _name(run: Contents) -> str:
    result = run.result
    if result is None:
        return f"{run.run.name} · {run.config.model.factory}"
    return f"{run.run.name} · {number(result.compression)}× · {result.verdict} · {result.network}"


def _status(run: Contents, finished: bool) -> str:
    """MLflow's word for how a part of the run stands."""
    if finished:
        return "FINISHED"
    return "RUNNING" if run.ended is None or run.result is not None else run.ended.how.upper()


def _ended_ms(run: Contents) -> int:
    """When the run ended, or its driver; what is last known of one that left no word."""
    if run.result is not None or run.ended is None:
        return run.finished_ms
    return run.ended.ms or max([run.finished_ms, *(moment.ms for moment in run.course)])


def _data_name(config: Config) -> str:
    root = config.data.root
    return config.data.source if root is None else PurePosixPath(root).name or root


def _data(run: Contents, config: Config) -> Iterator[DataSet]:
    """The splits of the run's data. Older runs do not know its digest, and have none."""
    facts = run.data
    if facts is None or facts.data is None:
        return
    for split, samples in (("train", facts.train), ("val", facts.val), ("test", facts.test)):
        yield DataSet(
            split,
            f"{_data_name(config)} ({split})",
            facts.data[:36],
            None if facts.root is None else hide(facts.root),
            samples,
        )


def child(run: Contents, each: Round, config: Config, of_run: Sequence[Point]) -> MlflowRun:
    """One round: its numbers, its retraining, its plan, its network; `of_run` are the points of the run as a whole."""
    metrics = each.metrics
    again = f" (attempt {each.attempt})" if each.attempt > 1 else ""
    points: list[Point] = []
    tables: list[Artifact] = []
    tags, reached = {}, ""
    if metrics is not None:
        points = list(curves.of_round(metrics))
        tables = [table("layers.json", metrics.layers)]
        tags = {"secateur.accepted": str(metrics.accepted).lower()}
        reached = f" · {number(metrics.compression)}×{'' if metrics.accepted else ' · undone'}"
    folder = f"{each.folder}/"

    def of_this_attempt(name: str) -> bool:
        return name.startswith(folder) and "/" not in name.removeprefix(folder)

    status = _status(run, metrics is not None)
    return MlflowRun(
        name=f"{run.run.name} · round {each.number}{again}{reached}",
        identity={
            UID: run.run.uid,
            KIND: "round",
            ROUND: str(each.number),
            ATTEMPT: str(each.attempt),
        },
        tags=tags,
        params={},
        points=tuple(points),
        artifacts=(*_files(run, of_this_attempt, strip=folder), *tables),
        start_ms=_began(run, each),
        status=status,
        end_ms=metrics.finished_ms if metrics is not None else None if status == "RUNNING" else _ended_ms(run),
        tables=tuple(table.path for table in tables),
        model=networks.of_round(run, each, config, of_run),
    )


def _of_the_run(name: str) -> bool:
    """Whether a file is one of the run as a whole; the ONNX file goes into MLflow as a model."""
    if name == networks.ONNX:
        return False
    return name == "rounds/control.json" or not name.startswith("rounds/")


def _began(run: Contents, each: Round) -> int:
    """The end of the part before a round. It must not change later, since MLflow keeps the first value that it gets."""
    before = [m for m in run.finished_rounds if (m.round, m.attempt) < (each.number, each.attempt)]
    parts = [part for part in (run.dense, *before) if part is not None]
    return max([run.run.created_ms, *(part.finished_ms for part in parts)])


def _files(run: Contents, wanted: Callable[[str], bool], strip: str = "") -> Iterator[Artifact]:
    for name, known in mirrored_files(run.path).items():
        if wanted(name):
            url = storage.join(run.path, name)
            yield artifacts.of_file(name.removeprefix(strip), url, known.version)


def _figures(run: Contents) -> Iterator[Artifact]:
    """The report's figures as PNG, drawn only when what they show has changed."""
    from pipeline.results import figures, plots

    control, metrics = run.control, run.finished_rounds
    if run.scan is not None and worth.sensitivity(run.scan):
        scan = run.scan
        yield figure("sensitivity", scan.to_json(), lambda: figures.to_png(plots.sensitivity(scan)))
        yield figure("sensitivity-loss", scan.to_json(), lambda: figures.to_png(plots.sensitivity(scan, "loss")))
    if run.dense is not None:
        dense = run.dense
        basis = [dense, metrics, control]
        if worth.rounds(metrics):
            yield figure("rounds", basis, lambda: figures.to_png(plots.rounds(dense, metrics, control)))
        if worth.training(dense, metrics):
            yield figure("training", basis, lambda: figures.to_png(plots.training(dense, metrics, control)))
    if run.result is not None:
        layers, density = run.result.layers, run.result.density
        yield figure("layers", [layers, density], lambda: figures.to_png(plots.layers(layers, density)))
    for tensor in filter(worth.histogram, run.histograms.tensors if run.histograms is not None else ()):

        def draw(tensor: WeightHistogram = tensor) -> bytes:
            return figures.to_png(plots.histogram(tensor))

        yield figure(f"weights/{artifacts.safe(tensor.name)}", tensor, draw)


def _key(name: str) -> str:
    """A setting's name in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "._-/ :" else "_" for c in name)[:MAX_KEY]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str, most: int = MAX_PARAM) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
