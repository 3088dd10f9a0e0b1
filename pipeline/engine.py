"""What runs work on processes: the interface that `LocalEngine` and Ray's engine fill."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.prune.budget import Keep
from pipeline.run.events import Progress
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.train.session import Session

# For each tensor, the levels measured so far.
Trials = dict[str, list[dict[str, Any]]]
OnLevel = Callable[[str, dict[str, Any]], None]
Together = Callable[[Sequence[Keep]], Iterable[dict[str, Any]]]


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

    def scan(self, todo: Trials, config: Config, run: Run, on_level: OnLevel, source: str) -> dict[str, float]:
        """Measure what each tensor's levels in `todo` lack; returns the figures of the network as it is in `source`.

        `source` is the folder of a checkpoint, whose masks stay applied.
        """

    def together(self, config: Config, run: Run, source: str) -> Together:
        """A function that measures the network in `source` with all its tensors pruned, at one allocation after the
        other."""

    def close(self) -> None:
        """Release what the engine holds."""
