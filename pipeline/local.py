"""The engine without Ray: this process alone, or all processes that torchrun started."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from pipeline.base.record import Record, plain
from pipeline.engine import Levels, OnLevel, Together, Work
from pipeline.run.events import Progress, unheard
from pipeline.run.records import Figures
from pipeline.run.state import Run
from pipeline.scan import levels, together
from pipeline.scan.inputs import ScanInputs, scan_inputs
from pipeline.settings.config import Config, parse_config
from pipeline.train.session import open_session
from pipeline.train.world import World


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
        self.world = world
        self._working = False  # whether the followers are within a stage, too

    def train(self, work: Work, config: Config, run: Run, progress: Progress) -> None:
        """Do it here and on every follower."""
        self._tell(Call(work, config.model_dump(mode="json"), run.root, run.fence, run.token))
        self._working = True
        work.do(open_session(config, self.world, run, progress))
        self._working = False

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        """Measure tensor after tensor in this process."""
        given = self._inputs(config, run, source)
        dense = given.answers()
        for name, known in todo.items():
            for level in levels.scan_tensor(given, dense, name, known):
                on_level(name, level)
        return dense.figures()

    def together(self, config: Config, run: Run, source: str) -> Together:
        """Measure allocation after allocation in this process."""
        given = self._inputs(config, run, source)
        dense = given.answers()
        return lambda keeps: together.measure(given, dense, keeps)

    def close(self) -> None:
        """Let the followers go; out of the middle of a stage they go as this process does."""
        if not self._working:
            with contextlib.suppress(RuntimeError):  # torch's, where one was stopped too and is gone
                self._tell(None)

    def follow(self) -> None:
        """On ranks other than 0: do what rank 0 does until it closes."""
        while True:
            told = json.loads(self.world.broadcast(None))
            if told is None:
                return
            call = Call.from_json(told, "what rank 0 tells")
            run = Run(call.root, call.fence, call.token)
            call.work.do(open_session(parse_config(call.config), self.world, run, unheard))

    def _inputs(self, config: Config, run: Run, source: str) -> ScanInputs:
        return scan_inputs(open_session(config, World(0, 1, self.world.device), run, unheard), source)

    def _tell(self, call: Call | None) -> None:
        """What the followers do next; None ends them."""
        self.world.broadcast(json.dumps(plain(call)).encode())
