"""The engine without Ray: this process alone, or all processes that torchrun started."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from pipeline.base.record import Record, plain
from pipeline.base.spread import Spread, processes
from pipeline.engine import Levels, OnLevel, Together, Work
from pipeline.run import log
from pipeline.run.events import Event, Progress, Warned, unheard
from pipeline.run.records import Figures
from pipeline.run.state import Run
from pipeline.scan import levels, together
from pipeline.scan.inputs import ScanInputs, scan_inputs
from pipeline.settings.config import Config, parse_config
from pipeline.train.session import open_session
from pipeline.train.world import Posts, World, watched


@dataclass(frozen=True)
class Call(Record):
    """Work that all ranks do, and on what: the run's folder, and its writer's number and token (`Run`)."""

    work: Work
    config: dict[str, Any]  # settings, which `parse_config` validates
    root: str
    fence: int
    token: str | None


class LocalEngine:
    """Rank 0 drives; the other ranks of torchrun, if any, `follow` it."""

    def __init__(self, world: World) -> None:
        self.world, self._posts = world, Posts(world)
        self._working = False  # whether the followers are within a stage, too

    def train(self, work: Work, config: Config, run: Run, progress: Progress) -> None:
        """Do it here and on every follower."""
        self._tell(Call(work, config.model_dump(mode="json"), run.root, run.fence, run.token))
        self._working = True
        self._do(work, config, run, progress)
        self._working = False

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        """Measure tensor after tensor in this process."""
        given = self._inputs(config, run, source)
        dense = given.answers()
        for name, known in todo.items():
            for level in levels.scan_part(given, dense, name, known):
                on_level(name, level)
        return dense.figures()

    def together(self, config: Config, run: Run, source: str) -> Together:
        """Measure allocation after allocation in this process."""
        given = self._inputs(config, run, source)
        dense = given.answers()
        return lambda keeps: together.measure(given, dense, keeps)

    def spread(self, config: Config, run: Run) -> Spread:
        """Processes of this machine."""
        return processes(config.data.build_workers)

    def hear(self, event: Event) -> None:
        """Nothing here asks."""

    def close(self) -> None:
        """Let the followers go; out of the middle of a stage they go as this process does."""
        if not self._working:
            with contextlib.suppress(RuntimeError):  # torch's, where one was stopped too and is gone
                self._tell(None)

    def follow(self) -> None:
        """On ranks other than 0: do what rank 0 does until it closes."""
        while True:
            told = json.loads(self._posts.wait())
            if told is None:
                return
            call = Call.from_json(told, "what rank 0 tells")
            run = Run(call.root, call.fence, call.token)
            self._do(call.work, parse_config(call.config), run, unheard)

    def _do(self, work: Work, config: Config, run: Run, progress: Progress) -> None:
        """This rank's part of the work, which its own log tells of."""

        def tell(text: str) -> None:
            progress(Warned(text))

        number, rank = self._posts.number, self.world.rank
        with (
            log.kept(run, log.rank_name(run, work.stage, 1, rank), tell, rank, 1) as kept,
            watched(self.world, f"work {number}", config.cluster.hang_seconds, _end) as world,
        ):
            work.do(open_session(config, world, run, kept.hearing(progress)))

    def _inputs(self, config: Config, run: Run, source: str) -> ScanInputs:
        return scan_inputs(open_session(config, World(0, 1, self.world.device), run, unheard), source)

    def _tell(self, call: Call | None) -> None:
        """What the followers do next; None ends them."""
        self._posts.send(json.dumps(plain(call)).encode())


def _end(found: str) -> None:
    """End this process, which waits within torch for a rank that hangs: nothing else gets it out of there."""
    sys.stdout.flush()
    print(f"error: {found}. The same command goes on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(2)
