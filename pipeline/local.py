"""The engine without Ray: this process alone, or all processes that torchrun started."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import Any

from pipeline.engine import OnLevel, Together, Trials
from pipeline.run.state import Run
from pipeline.scan import levels, together
from pipeline.scan.inputs import scan_inputs
from pipeline.scan.levels import answers_of
from pipeline.settings.config import Config, parse_config
from pipeline.stages import work
from pipeline.train.session import Progress, open_session
from pipeline.train.world import World


class LocalEngine:
    """Rank 0 drives; the other ranks of torchrun, if any, `follow` it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._working = False  # whether the followers are within a stage, too

    def train(self, stage: str, config: Config, run: Run, progress: Progress) -> None:
        """Run the stage here and on every follower."""
        self._call({"stage": stage, "config": config.model_dump(mode="json"), "root": run.root, "fence": run.fence})
        self._working = True
        work(stage, open_session(config, self.world, run, progress))
        self._working = False

    def scan(self, todo: Trials, config: Config, run: Run, on_level: OnLevel, source: str) -> dict[str, float]:
        """Measure tensor after tensor in this process."""
        device = self.world.device
        opened = open_session(config, World(0, 1, device), run, lambda event: None)
        model, alive, batches, calibration, statistics = scan_inputs(opened, source)
        dense = answers_of(model, batches, config, device)
        for name, known in todo.items():
            for level in levels.scan_tensor(
                model, name, known, batches, dense, config, device, alive, calibration, statistics
            ):
                on_level(name, asdict(level))
        return dense.figures()

    def together(self, config: Config, run: Run, source: str) -> Together:
        """Measure allocation after allocation in this process."""
        device = self.world.device
        model, _, batches, calibration, statistics = scan_inputs(
            open_session(config, World(0, 1, device), run, lambda event: None), source
        )
        dense = answers_of(model, batches, config, device)
        return lambda keeps: together.measure(model, keeps, batches, dense, config, device, calibration, statistics)

    def close(self) -> None:
        """Let the followers go; out of the middle of a stage they go as this process does."""
        if not self._working:
            with contextlib.suppress(RuntimeError):  # torch's, where one was stopped too and is gone
                self._call({"stage": None})

    def follow(self) -> None:
        """On ranks other than 0: do what rank 0 does until it closes."""
        while True:
            call = json.loads(self.world.broadcast(None))
            if call["stage"] is None:
                return
            config = parse_config(call["config"])
            run = Run(call["root"], call["fence"])
            work(call["stage"], open_session(config, self.world, run, lambda event: None))

    def _call(self, call: dict[str, Any]) -> None:
        self.world.broadcast(json.dumps(call).encode())
