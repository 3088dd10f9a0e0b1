"""The networks of a run as models of MLflow: that of each accepted round, and the one that is handed over.

The last one is an ONNX file, which needs no code of ours. Rounds, and a network that ONNX cannot hold, are tensors and
settings, which `pipeline.tracking.loader` makes a network of: no export for each round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.base.version import VERSION
from pipeline.results import outcome
from pipeline.results.words import number, percent
from pipeline.run.contents import Contents, Round, mirrored_files
from pipeline.run.layout import NO_ONNX
from pipeline.run.records import DataFacts
from pipeline.settings.config import Config
from pipeline.tracking import artifacts, curves
from pipeline.tracking.artifacts import Artifact
from pipeline.tracking.curves import Point

UID = "secateur.uid"
ONNX, TENSORS = "final/model.onnx", "final/model.safetensors"


@dataclass(frozen=True)
class Model:
    """A network that takes {"input": (batch, *shape), float32} and gives {"output": logits}.

    `weights` is an ONNX file, or tensors in the network's own layout; `settings` are then the run's config.yaml.
    `metrics` were measured on the data set `data` (its name).
    """

    name: str
    weights: Artifact
    settings: str | None
    facts: DataFacts
    shape: tuple[int, ...]
    step: int  # on the run's axis
    params: dict[str, str]
    metrics: tuple[Point, ...]
    data: str
    tags: dict[str, str]
    note: str

    @property
    def digest(self) -> str:
        """Changes with the file, and with whatever MLflow holds beside it."""
        held = (self.weights.digest, self.name, self.params, self.metrics, self.data, self.tags, self.note)
        return hashlib.sha256(repr(held).encode()).hexdigest()[:16]


def final(run: Contents, config: Config, points: Sequence[Point]) -> Model | None:
    """The network that is handed over, once it is there as ONNX, or is known to have no such form.

    `points` are the run's: they tell how many updates it had.
    """
    result, facts = run.result, run.data
    if result is None or facts is None or config.tracking.models == "none":
        return None
    there = mirrored_files(run.path)
    path = ONNX if ONNX in there else TENSORS
    if path not in there or (path == TENSORS and NO_ONNX not in there):
        return None
    url = storage.join(run.path, path)
    return Model(
        name=_named(run, "final"),
        weights=artifacts.of_file(path, url, there[path].version),
        settings=None if path == ONNX else run.config_text,
        facts=facts,
        shape=_shape(config),
        step=_updates(points, run.finished_ms),
        params=_params(config, result.network, result.compression, needs_us=path != ONNX),
        metrics=tuple(
            Point(key, float(value), result.test_looks, run.finished_ms)
            for key, value in curves.on_test(result).items()
            if value is not None
        ),
        data="test",
        tags={UID: run.run.uid, "verdict": result.verdict, "compression": f"{result.compression:.6g}"},
        note=outcome.sentence(result),
    )


def of_round(run: Contents, each: Round, config: Config, points: Sequence[Point]) -> Model | None:
    """The network of an accepted round; `points` are the run's."""
    reached, facts = each.metrics, run.data
    url = storage.join(run.path, each.folder, "checkpoint", "weights.safetensors")
    if reached is None or not reached.accepted or facts is None or config.tracking.models != "rounds":
        return None
    if not storage.exists(url):
        return None  # a run that was cleared, or is older than these files
    identity = f"{run.run.uid} {reached.round} {reached.attempt} {reached.finished_ms}"
    tags = {UID: run.run.uid, "round": str(reached.round), "compression": f"{reached.compression:.6g}"}
    told = f"{number(reached.compression)}× fewer weights, {percent(1 - reached.val.top1)} error on val"
    before = f"{percent(1 - reached.val_before_retrain.top1)} before retraining"
    return Model(
        name=_named(run, f"round-{reached.round}"),
        weights=artifacts.known_as(TENSORS, url, identity),
        settings=run.config_text,
        facts=facts,
        shape=_shape(config),
        step=_updates(points, reached.finished_ms),
        params=_params(config, config.model.factory, reached.compression, needs_us=True),
        metrics=tuple(curves.came_to(reached)),
        data="val",
        tags=tags,
        note=f"Round {reached.round}: {told} ({before}).",
    )


def _named(run: Contents, part: str) -> str:
    """A model's name, which may hold no dot, as run names may. How small it is stands in tags and params."""
    return f"{artifacts.safe(run.run.name).replace('.', '_')}-{part}"


def _updates(points: Sequence[Point], until: int) -> int:
    """How many updates the network had got by then, on the run's one axis."""
    return max((p.step for p in points if p.key == "train/loss" and p.when <= until), default=0)


def _shape(config: Config) -> tuple[int, ...]:
    return (config.data.channels, config.data.size, config.data.size)


def _params(config: Config, network: str, compression: float, needs_us: bool) -> dict[str, str]:
    """What somebody who finds the model should know."""
    data = config.data
    return {
        "network": network,
        "compression": number(compression),
        "input": "float32, (value / 255 - mean) / std of each channel",
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
        "output": "logits",
        **({"needs": f"secateur {VERSION} or newer"} if needs_us else {}),
    }
