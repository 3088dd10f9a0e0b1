"""What runs work on processes: the interface that `LocalEngine` and Ray's engine fill."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.base.spread import Spread
from pipeline.prune.budget import Keep
from pipeline.run.events import Event, Progress
from pipeline.run.records import Difference, Figures, Level
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.train.session import Session

Levels = dict[str, list[Level]]  # of each tensor, those measured so far
OnLevel = Callable[[str, Level], None]  # is told each level as it is known, with the tensor's name
Together = Callable[[Sequence[Keep]], Iterable[Difference]]


@dataclass(frozen=True)
class Work:
    """What the workers of a stage do: a function of a Session, by its place in this project ("package.module:name").

    A place, not a function: workers import it, so that nothing below them needs to know it.
    """

    stage: str
    function: str

    def do(self, session: Session) -> None:
        """Do it, on every rank in lockstep."""
        module, _, name = self.function.partition(":")
        assert module.startswith("pipeline."), f"{self.function} is not ours"
        getattr(importlib.import_module(module), name)(session)


class Engine(Protocol):
    """What runs work on other processes. Its calls raise UserError or RunStopped with one message."""

    def train(self, work: Work, config: Config, run: Run, progress: Progress) -> None:
        """Do `work` on cluster.workers processes that train together."""

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        """Measure what each tensor's levels in `todo` lack; returns the figures of the network as it is in `source`.

        `source` is the folder of a checkpoint, whose masks stay applied.
        """

    def together(self, config: Config, run: Run, source: str) -> Together:
        """A function that measures the network in `source` with all its tensors pruned, at one allocation after the
        other."""

    def spread(self, config: Config, run: Run) -> Spread:
        """What builds the run's shards side by side."""

    def hear(self, event: Event) -> None:
        """Is told every event of the run, from any thread; for what watches the cluster."""

    def close(self) -> None:
        """Release what the engine holds."""
