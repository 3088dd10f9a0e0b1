"""One addition on each axis, as somebody would write it: a function or two, and a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.base.errors import UserError
from pipeline.base.spread import Spread
from pipeline.data.loader import Batch
from pipeline.data.parts import Part, Source
from pipeline.data.sources import Grey, Kind
from pipeline.engine import Levels, OnLevel, Together, Work
from pipeline.local import LocalEngine
from pipeline.prune.allocation import Allocation, Request
from pipeline.prune.criteria import Criterion, Weighed
from pipeline.prune.patterns import Pattern
from pipeline.run.events import Progress
from pipeline.run.records import Figures
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.settings.data import Data
from pipeline.settings.training import Train
from pipeline.stages import Driver, Stage
from pipeline.task import classification
from pipeline.task.task import Task


def smallest(given: Weighed) -> Tensor:
    """Keeps the smallest weights."""
    return -given.weight.abs()


CRITERION = Criterion(smallest)


def in_order(request: Request) -> dict[str, int]:
    """Each tensor keeps all it may, the first one first."""
    counts, left = dict(request.floors), request.budget - sum(request.floors.values())
    for name in counts:
        more = min(left, request.caps[name] - counts[name])
        counts[name], left = counts[name] + more, left - more
    return counts


ALLOCATION = Allocation(in_order)


def front_mask(scores: Tensor, alive: Tensor, keep: int) -> Tensor:
    """The first `keep` living weights, whatever their scores."""
    return alive & (alive.flatten().cumsum(0).view(alive.shape) <= keep)


def front_nested(scores: Tensor, alive: Tensor, keeps: Sequence[int]) -> Tensor:
    return torch.stack([front_mask(scores, alive, keep) for keep in keeps]).sum(0).to(torch.uint8)


PATTERN = Pattern(front_mask, front_nested, lambda shape: 1, lambda alive: int(alive.sum()))


def require_two(output: object, factory: str, classes: int) -> None:
    if not isinstance(output, Tensor) or output.shape[1:] != (2,):
        raise UserError(f"model.factory={factory} must give two numbers a sample: odd and even")


def losses(recipe: Train, output: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
    return F.cross_entropy(output, labels % 2, reduction="none")


def judge(output: Tensor, batch: Batch, present: Tensor | None) -> Tensor:
    halved = Batch(batch.images, batch.labels % 2, batch.weights, batch.indices)
    return classification.judge(output, halved, None)


PARITY = Task(
    shape=classification.shape,
    inputs=classification.inputs,
    require_output=require_two,
    losses=losses,
    mean_loss=lambda output, labels: F.cross_entropy(output, labels % 2),
    judge=judge,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))


def bars(config: Data, seed: int) -> Source:
    """400 and 80 images with one bright column, the class."""

    def part(count: int) -> Part:
        labels = np.arange(count, dtype=np.int64) % 8

        def item(number: int) -> Grey:
            pixels = np.full((8, 8), number % 50, np.uint8)
            pixels[:, labels[number]] = 255
            return Grey(pixels)

        return Part(labels, ("",) * count, item)

    return Source(tuple("01234567"), 8, part(400), part(80), "bars")


SOURCE = Kind(bars, needs_root=False)


def count(driver: Driver) -> None:
    """Writes how many tensors can be pruned."""
    driver.run.commit({"tensors": len(driver.prunable())}, "counted", "tensors.json")


STAGE = Stage("counted", "count of tensors", lambda driver: [], count, gives=("counted/tensors.json",))


class Noting:
    """An engine that notes which work it was given; `LocalEngine` does it."""

    def __init__(self, local: LocalEngine) -> None:
        self.local, self.done = local, list[str]()

    def train(self, work: Work, config: Config, run: Run, progress: Progress) -> None:
        self.done.append(work.stage)
        self.local.train(work, config, run, progress)

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        self.done.append("scan")
        return self.local.scan(todo, config, run, on_level, source)

    def together(self, config: Config, run: Run, source: str) -> Together:
        return self.local.together(config, run, source)

    def spread(self, config: Config, run: Run) -> Spread:
        return self.local.spread(config, run)

    def close(self) -> None:
        self.local.close()
