"""What runs work on processes: the interface that `LocalEngine` and Ray's engine fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from pipeline.prune.budget import Keep
from pipeline.run.events import Progress
from pipeline.run.state import Run
from pipeline.settings.config import Config

# For each tensor, the levels measured so far.
Trials = dict[str, list[dict[str, Any]]]
OnLevel = Callable[[str, dict[str, Any]], None]
Together = Callable[[Sequence[Keep]], Iterable[dict[str, Any]]]


class Engine(Protocol):
    """What runs work on other processes. Its calls raise UserError or RunStopped with one message."""

    def train(self, stage: str, config: Config, run: Run, progress: Progress) -> None:
        """Run `work(stage, ...)` on cluster.workers processes that train together."""

    def scan(self, todo: Trials, config: Config, run: Run, on_level: OnLevel, source: str) -> dict[str, float]:
        """Measure what each tensor's levels in `todo` lack; returns the figures of the network as it is in `source`.

        `source` is the folder of a checkpoint, whose masks stay applied.
        """

    def together(self, config: Config, run: Run, source: str) -> Together:
        """A function that measures the network in `source` with all its tensors pruned, at one allocation after the
        other."""

    def close(self) -> None:
        """Release what the engine holds."""
