"""The engine on Ray: trainings on Ray Train, the scan on Ray Tune. Ray is started when it is first needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from cluster import connect, losses, sweep, tasks
from cluster import train as training
from cluster.metrics import Gauges
from pipeline.base.errors import Lost, RunStopped
from pipeline.base.hiding import hide
from pipeline.base.spread import Spread, processes
from pipeline.engine import Levels, OnLevel, Together, Work
from pipeline.run.events import Event, Noted, Progress, unheard
from pipeline.run.records import Figures
from pipeline.run.state import Run
from pipeline.settings.cluster import asked
from pipeline.settings.config import Config

T = TypeVar("T")
R = TypeVar("R")


class RayEngine:
    """`pipeline.engine.Engine` on a Ray cluster."""

    def __init__(self) -> None:
        self.ray: Any = None
        self.gauges: Gauges | None = None

    def train(self, work: Work, config: Config, run: Run, progress: Progress) -> None:
        """Do it on a worker group of Ray Train."""
        self._connect(config, run, progress)
        progress(Noted(f"{work.stage}: Ray starts cluster.workers={asked(config.cluster.workers)}"))
        with self._in_a_sentence(work.stage):
            training.train(self.ray, work, config, run, progress)

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        """Run the scan as trials of Ray Tune."""
        self._connect(config, run)
        with self._in_a_sentence("scan"):
            return sweep.scan(self.ray, todo, config, run, on_level, source)

    def together(self, config: Config, run: Run, source: str) -> Together:
        """Measure allocations as tasks side by side."""
        self._connect(config, run)
        with self._in_a_sentence("scan"):
            return sweep.together(self.ray, config, run, source)

    def spread(self, config: Config, run: Run) -> Spread:
        """Ray tasks on a cluster whose nodes all see the source's files, else processes of the driver's machine.

        Ray is not started for it where it would be one of this machine alone.
        """
        if not connect.started_here(config):
            self._connect(config, run)
            if tasks.reaches_all(self.ray, config):
                return partial(self._spread_in_a_sentence, config)
        return processes(config.data.build_workers)

    def _spread_in_a_sentence(
        self, config: Config, function: Callable[[T], R], items: Iterable[T], count: int
    ) -> Generator[R]:
        with self._in_a_sentence("shards"):
            yield from tasks.on_cluster(self.ray, config)(function, items, count)

    def _connect(self, config: Config, run: Run, progress: Progress | None = None) -> None:
        """Join Ray, or start it, and tell `progress` of it; later calls find it there."""
        tell = progress or unheard
        first, began = self.ray is None, time.monotonic()
        if first:
            tell(Noted(connect.coming(config)))
        self.ray = connect.connect(config)
        if first:
            tell(Noted(f"Ray is there after {time.monotonic() - began:.1f} s: {connect.have(self.ray)}"))
        if self.gauges is None or self.gauges.run != hide(run.root):
            from ray.util.metrics import Gauge

            self.gauges = Gauges(hide(run.root), Gauge)
        with self._in_a_sentence("joining Ray"):
            connect.check_shared(self.ray, run.root)

    def hear(self, event: Event) -> None:
        """Set the run's gauges, once Ray is up."""
        if self.gauges is not None:
            self.gauges(event)

    @contextmanager
    def _in_a_sentence(self, stage: str) -> Iterator[None]:
        """Raise Lost for an error of Ray's that nothing in the block expected, as where it lost its own process.

        RunStopped where it would come again.
        """
        try:
            yield
        except self.ray.exceptions.RayError as error:
            remedy = f"To mend it, {losses.REMEDIES}. " if losses.is_memory(error) else ""
            raise (Lost if losses.is_loss(error) else RunStopped)(
                f"{stage}: a process of Ray's that carries messages or data of the run was lost: {losses.told(error)}; "
                f"it was not tried again. {remedy}The same command goes on"
            ) from error

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.ray is not None:
            with connect.sigterm_later():
                self.ray.shutdown()
            self.gauges = None  # Ray's own: gone with it
