"""What MLflow should hold for a run, derived from the run directory alone. Nothing here talks to a server."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.base.record import plain
from pipeline.run.contents import Contents, Round, mirrored_files
from pipeline.run.records import DenseMetrics, LayerCount, RoundMetrics, WeightHistogram
from pipeline.run.result import LayerResult
from pipeline.settings.config import Config, flatten

MAX_PARAM, MAX_KEY = 6000, 250  # characters that MLflow takes
# Raised when a figure or table is drawn differently, so that those already in MLflow are replaced.
_DRAWN = b"1"
UID, KIND, ROUND, ATTEMPT = "secateur.uid", "secateur.kind", "secateur.round", "secateur.attempt"
PARENT = "secateur.parent_run"  # the MLflow run of the run that this one branched off from


@dataclass(frozen=True)
class Point:
    """One value of one metric. `when` is in milliseconds since 1970 and comes from the run, so that a retry adds
    nothing."""

    key: str
    value: float
    step: int
    when: int


@dataclass(frozen=True)
class Artifact:
    """A file by its place in MLflow; `digest` tells whether MLflow has it, `open` gives its bytes' place on disk."""

    path: str
    digest: str
    open: Callable[[Path], Path] = field(compare=False)


@dataclass(frozen=True)
class MlflowRun:
    """One MLflow run as it should be. `identity` are the tags it is found by."""

    name: str
    identity: dict[str, str]
    tags: dict[str, str]
    params: dict[str, str]
    points: tuple[Point, ...]
    artifacts: tuple[Artifact, ...]
    start_ms: int
    end_ms: int | None  # None while it is running
    tables: tuple[str, ...] = ()


def parent(run: Contents, config: Config) -> MlflowRun:
    """The run itself: settings, the course of the rounds, the final numbers, and every file worth keeping."""
    result = run.result
    tags = {"secateur.network": config.model.factory}
    if result is not None:
        tags |= {"secateur.network": result.network, "secateur.verdict": result.verdict}
    if run.start is not None:
        begun = {"run": run.start.run, "uid": run.start.uid, "round": str(run.start.round)}
        tags |= {f"secateur.source_{key}": value for key, value in begun.items()}
        tags |= {PARENT: run.start.mlflow_run_id} if run.start.mlflow_run_id else {}
    drawn = [_table("layers.json", result.layers)] if result is not None else []
    return MlflowRun(
        name=run.run.name,
        identity={UID: run.run.uid, KIND: "run"},
        tags=tags,
        params={_key(name): _cut(_text(value)) for name, value in flatten(config).items()},
        points=(*_course(run), *_outcome(run)),
        artifacts=(*_files(run, _of_the_run), *drawn, *_figures(run)),
        start_ms=run.run.created_ms,
        end_ms=run.finished_ms if result is not None else None,
        tables=tuple(each.path for each in drawn),
    )


def child(run: Contents, each: Round) -> MlflowRun:
    """One round: its numbers, its retraining by epoch, its plan."""
    metrics = each.metrics
    again = f" (attempt {each.attempt})" if each.attempt > 1 else ""
    points: list[Point] = []
    tables: list[Artifact] = []
    end = None
    tags = {}
    if metrics is not None:
        end = metrics.finished_ms
        points = [*_numbers(_round_numbers(metrics), each.number, end), *_history("epoch", metrics)]
        tables = [_table("layers.json", metrics.layers)]
        tags = {"secateur.accepted": str(metrics.accepted).lower()}
    folder = f"{each.folder}/"

    def of_this_attempt(name: str) -> bool:
        return name.startswith(folder) and "/" not in name.removeprefix(folder)

    return MlflowRun(
        name=f"round {each.number}{again}",
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
        end_ms=end,
        tables=tuple(table.path for table in tables),
    )


def _of_the_run(name: str) -> bool:
    return name == "rounds/control.json" or not name.startswith("rounds/")


def _began(run: Contents, each: Round) -> int:
    """The end of the part before a round. It must not change later, since MLflow keeps the first value that it gets."""
    before = [m for m in run.finished_rounds if (m.round, m.attempt) < (each.number, each.attempt)]
    parts = [part for part in (run.dense, *before) if part is not None]
    return max([run.run.created_ms, *(part.finished_ms for part in parts)])


def _course(run: Contents) -> Iterator[Point]:
    """`round.*`, step = round, the dense network as round 0; and the training curves of dense and its control."""
    if run.dense is not None:
        val, when = run.dense.val, run.dense.finished_ms
        start = {"density": 1.0, "sparsity": 0.0, "compression": 1.0, "val_top1": val.top1, "val_loss": val.loss}
        yield from _numbers({f"round.{key}": value for key, value in start.items()}, 0, when)
        yield from _history("dense", run.dense)
    for metrics in run.finished_rounds:
        if metrics.accepted:
            numbers = _round_numbers(metrics)
            del numbers["kept"], numbers["seconds"]
            numbers = {f"round.{key}": value for key, value in numbers.items()}
            yield from _numbers(numbers, metrics.round, metrics.finished_ms)
    if run.control is not None:
        yield from _history("control", run.control)


def _round_numbers(metrics: RoundMetrics) -> dict[str, float]:
    return {
        "density": metrics.density,
        "sparsity": 1.0 - metrics.density,
        "compression": metrics.compression,
        "kept": metrics.kept,
        "val_top1": metrics.val.top1,
        "val_loss": metrics.val.loss,
        "val_top1_before_retrain": metrics.val_before_retrain.top1,
        "seconds": metrics.seconds,
    }


def _history(prefix: str, part: DenseMetrics | RoundMetrics) -> Iterator[Point]:
    """A training's curves, step = epoch. Each epoch's time is counted back from the end of the part."""
    left = 0.0  # seconds from the end of this epoch to the end of the last
    for epoch in reversed(part.history):
        when = part.finished_ms - round(1000 * left)
        curves = {f"{prefix}.loss": epoch.loss, f"{prefix}.val_top1": epoch.val_top1, f"{prefix}.lr": epoch.lr}
        pace = {f"{prefix}.images_per_s": epoch.images_per_s, f"{prefix}.waiting": epoch.waiting}
        curves |= {name: value for name, value in pace.items() if value is not None}
        yield from _numbers(curves, epoch.epoch, when)
        left += epoch.seconds


def _outcome(run: Contents) -> Iterator[Point]:
    """The final numbers. Step = looks at test, so that a later look stands after the one before, not beside it."""
    result = run.result
    if result is None:
        return
    test, mcnemar = result.test, result.test.mcnemar
    low, high = mcnemar.drop_ci95
    numbers = {
        "compression": result.compression,
        "density": result.density,
        "flops_density": result.flops_density,
        "flops_density_weights": result.flops_density_weights,
        "weights_total": result.weights_total,
        "weights_kept": result.weights_kept,
        **{f"test.{key}": value for key, value in test.pruned},
        **{f"test.dense_{key}": value for key, value in test.dense},
        **{f"test.dense_control_{key}": value for key, value in test.dense_control or ()},
        "test.drop": test.reference.top1 - test.pruned.top1,
        "test.drop_low": low,
        "test.drop_high": high,
        "test.p_value": mcnemar.p_value,
        "test.looks": result.test_looks,
        **{f"bytes.{key}": value for key, value in result.bytes},
        **{f"seconds.{key}": value for key, value in result.seconds},
    }
    yield from _numbers(numbers, result.test_looks, run.finished_ms)


def _numbers(values: Mapping[str, float | None], step: int, when: int) -> Iterator[Point]:
    """Points for the values that were measured; a null is left out."""
    for key, value in values.items():
        if value is not None:
            yield Point(key, float(value), step, when)


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
