"""What runs work on processes: the interface that `LocalEngine` and Ray's engine fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pipeline.prune.budget import Keep
from pipeline.run.events import Progress
from pipeline.run.records import Difference, Figures, Level
from pipeline.run.state import Run
from pipeline.settings.config import Config

Levels = dict[str, list[Level]]  # of each tensor, those measured so far
OnLevel = Callable[[str, Level], None]  # is told each level as it is known, with the tensor's name
Together = Callable[[Sequence[Keep]], Iterable[Difference]]


class Engine(Protocol):
    """What runs work on other processes. Its calls raise UserError or RunStopped with one message."""

    def train(self, stage: str, config: Config, run: Run, progress: Progress) -> None:
        """Run `work(stage, ...)` on cluster.workers processes that train together."""

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        """Measure what each tensor's levels in `todo` lack; returns the figures of the network as it is in `source`.

        `source` is the folder of a checkpoint, whose masks stay applied.
        """

    def together(self, config: Config, run: Run, source: str) -> Together:
        """A function that measures the network in `source` with all its tensors pruned, at one allocation after the
        other."""

    def close(self) -> None:
        """Release what the engine holds."""
