"""What MLflow should hold for a run, derived from the run directory alone. Nothing here talks to a server."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.base.hiding import hide
from pipeline.base.record import plain
from pipeline.results import outcome
from pipeline.results.words import number
from pipeline.run.contents import Contents, Round, mirrored_files
from pipeline.run.records import LayerCount, WeightHistogram
from pipeline.run.result import LayerResult
from pipeline.settings.config import Config, flatten
from pipeline.tracking import curves, notes
from pipeline.tracking.curves import Point

MAX_PARAM, MAX_KEY = 6000, 250  # characters that MLflow takes
# Raised when a figure or table is drawn differently, so that those already in MLflow are replaced.
_DRAWN = b"1"
UID, KIND, ROUND, ATTEMPT = "secateur.uid", "secateur.kind", "secateur.round", "secateur.attempt"
_ONNX = "final/model.onnx"
PARENT = "secateur.parent_run"  # the MLflow run of the run that this one branched off from


@dataclass(frozen=True)
class Artifact:
    """A file by its place in MLflow; `digest` tells whether MLflow has it, `open` gives its bytes' place on disk."""

    path: str
    digest: str
    open: Callable[[Path], Path] = field(compare=False)


@dataclass(frozen=True)
class DataSet:
    """A split of the run's data. `source` is a path or URL, None for what an installed package holds."""

    split: str
    name: str
    digest: str
    source: str | None
    samples: int


@dataclass(frozen=True)
class Model:
    """The final network as a model of MLflow: an ONNX file that takes (batch, *shape), float32, and gives logits."""

    name: str
    onnx: Artifact
    shape: tuple[int, ...]
    classes: int
    step: int  # on the run's axis
    params: dict[str, str]
    metrics: tuple[Point, ...]
    tags: dict[str, str]
    note: str


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
    drawn = [_table("layers.json", result.layers)] if result is not None else []
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
        model=_model(run, config, max((p.step for p in points if p.key == "train/loss"), default=0)),
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


def _model(run: Contents, config: Config, step: int) -> Model | None:
    """The final network, where the run is finished and has it as ONNX."""
    result, facts = run.result, run.data
    url = storage.join(run.path, _ONNX)
    known = mirrored_files(run.path).get(_ONNX)
    if result is None or facts is None or known is None:
        return None
    points = curves.on_test(result)
    data = config.data
    return Model(
        name=_safe(f"{run.run.name}-{number(result.compression)}x"),
        onnx=Artifact(_ONNX, _file_digest(url, known.version), partial(_fetch, url)),
        shape=(data.channels, data.size, data.size),
        classes=facts.classes,
        step=step,
        params={
            "network": result.network,
            "compression": number(result.compression),
            "input": "float32, (value / 255 - mean) / std of each channel",
            "mean": json.dumps(list(data.mean)),
            "std": json.dumps(list(data.std)),
            "output": "logits",
        },
        metrics=tuple(
            Point(key, float(value), result.test_looks, run.finished_ms)
            for key, value in points.items()
            if value is not None
        ),
        tags={UID: run.run.uid, "verdict": result.verdict, "compression": f"{result.compression:.6g}"},
        note=outcome.sentence(result),
    )


def child(run: Contents, each: Round) -> MlflowRun:
    """One round: its numbers, its retraining, its plan."""
    metrics = each.metrics
    again = f" (attempt {each.attempt})" if each.attempt > 1 else ""
    points: list[Point] = []
    tables: list[Artifact] = []
    tags, reached = {}, ""
    if metrics is not None:
        points = list(curves.of_round(metrics))
        tables = [_table("layers.json", metrics.layers)]
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
    )


def _of_the_run(name: str) -> bool:
    """Whether a file is one of the run as a whole; the ONNX file goes into MLflow as a model."""
    if name == _ONNX:
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
            yield Artifact(name.removeprefix(strip), _file_digest(url, known.version), partial(_fetch, url))


def _fetch(url: str, folder: Path) -> Path:
    if storage.is_local(url):
        return storage.local_path(url)
    target = Path(tempfile.mkdtemp(dir=folder), PurePosixPath(url).name)
    storage.copy(url, str(target))
    return target


def _table(path: str, rows: Sequence[LayerResult] | Sequence[LayerCount]) -> Artifact:
    """A table in the form that MLflow's page shows: pandas' "split" JSON, columns and rows apart."""
    plain_rows = [plain(row) for row in rows]
    columns = list(plain_rows[0]) if plain_rows else []
    text = json.dumps({"columns": columns, "data": [list(row.values()) for row in plain_rows]})
    return _generated(path, text.encode(), lambda: text.encode())


def _figures(run: Contents) -> Iterator[Artifact]:
    """The report's figures as PNG, drawn only when what they show has changed."""
    from pipeline.results import figures, plots

    control, metrics = run.control, run.finished_rounds
    if run.scan is not None:
        scan = run.scan
        yield _figure("sensitivity", scan.to_json(), lambda: figures.to_png(plots.sensitivity(scan)))
        yield _figure("sensitivity-loss", scan.to_json(), lambda: figures.to_png(plots.sensitivity(scan, "loss")))
    if run.dense is not None and metrics:
        dense = run.dense
        basis = [dense, metrics, control]
        yield _figure("rounds", basis, lambda: figures.to_png(plots.rounds(dense, metrics, control)))
        yield _figure("training", basis, lambda: figures.to_png(plots.training(dense, metrics, control)))
    if run.result is not None:
        layers, density = run.result.layers, run.result.density
        yield _figure("layers", [layers, density], lambda: figures.to_png(plots.layers(layers, density)))
    for tensor in run.histograms.tensors if run.histograms is not None else ():

        def draw(tensor: WeightHistogram = tensor) -> bytes:
            return figures.to_png(plots.histogram(tensor))

        yield _figure(f"weights/{_safe(tensor.name)}", tensor, draw)


def _figure(name: str, basis: Any, draw: Callable[[], bytes]) -> Artifact:
    return _generated(f"figures/{name}.png", json.dumps(plain(basis), sort_keys=True).encode(), draw)


def _generated(path: str, basis: bytes, make: Callable[[], bytes]) -> Artifact:
    """An artifact that is made when it is needed; its digest is that of what it is made from."""

    def write(folder: Path) -> Path:
        target = Path(tempfile.mkdtemp(dir=folder)) / Path(path).name
        target.write_bytes(make())
        return target

    return Artifact(path, hashlib.sha256(_DRAWN + basis).hexdigest(), write)


@lru_cache(maxsize=256)
def _file_digest(url: str, version: str) -> str:
    """SHA-256 of a local file. The version is the cache's key, so that a large model is not read again each time.

    On S3, the SHA-256 of the version, which identifies the content without a download.
    """
    return storage.sha256(url) if storage.is_local(url) else hashlib.sha256(version.encode()).hexdigest()


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:120]


def _key(name: str) -> str:
    """A setting's name in the characters that MLflow takes."""
    return "".join(c if c.isalnum() or c in "._-/ :" else "_" for c in name)[:MAX_KEY]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_PARAM else text[: MAX_PARAM - 1] + "…"
