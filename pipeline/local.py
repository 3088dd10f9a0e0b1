"""The engine without Ray: this process alone, or all processes that torchrun started."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline import config as settings
from pipeline import models, prepare
from pipeline.config import Config
from pipeline.data.loader import Batch, EvalLoader
from pipeline.distributed import World
from pipeline.engine import OnLevel, Together, Trials, work
from pipeline.prune import sensitivity, together
from pipeline.session import Progress, Session, open_session
from pipeline.state import Run
from pipeline.train import batch_norm, checkpoint


class LocalEngine:
    """Rank 0 drives; the other ranks of torchrun, if any, `follow` it."""

    def __init__(self, world: World) -> None:
        self.world = world

    def train(self, stage: str, config: Config, run: Run, progress: Progress) -> None:
        """Run the stage here and on every follower."""
        self._call({"stage": stage, "config": config.model_dump(mode="json"), "root": run.root, "fence": run.fence})
        work(stage, open_session(config, self.world, run, progress))

    def scan(self, todo: Trials, config: Config, run: Run, on_level: OnLevel, source: str) -> dict[str, float]:
        """Measure tensor after tensor in this process."""
        device = self.world.device
        opened = open_session(config, World(0, 1, device), run, lambda event: None)
        model, alive, batches, calibration, statistics = scan_inputs(opened, source)
        dense = sensitivity.answers(model, batches, config, device)
        for name, known in todo.items():
            for level in sensitivity.scan_tensor(
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
        dense = sensitivity.answers(model, batches, config, device)
        return lambda keeps: together.measure(model, keeps, batches, dense, config, device, calibration, statistics)

    def close(self) -> None:
        """Let the followers go."""
        self._call({"stage": None})

    def follow(self) -> None:
        """On ranks other than 0: do what rank 0 does until it closes."""
        while True:
            call = json.loads(self.world.broadcast(None))
            if call["stage"] is None:
                return
            config = settings.parse(call["config"])
            run = Run(call["root"], call["fence"])
            work(call["stage"], open_session(config, self.world, run, lambda event: None))

    def _call(self, call: dict[str, Any]) -> None:
        self.world.broadcast(json.dumps(call).encode())


class ScanInputs(NamedTuple):
    """The network and masks of a checkpoint, the val batches (uint8) that levels are measured on, those of train that
    batch norm is calibrated on, and the statistics of the weights that the criterion needs, by tensor."""

    model: nn.Module
    alive: dict[str, Tensor]
    batches: list[Batch]
    calibration: list[Batch]
    statistics: dict[str, Tensor]


def scan_inputs(opened: Session, source: str) -> ScanInputs:
    """What every level of a scan of checkpoint `source` needs."""
    config = opened.config
    model, saved = opened.new_model(), checkpoint.load(opened.run, source)
    model.load_state_dict(saved.weights)
    loader = EvalLoader(opened.split("val"), config.data, limit=config.scan.samples, seed=config.seed)
    if config.scan.interval is None:
        batches = [*loader.batches(0, 1)]
    else:
        batches = sensitivity.shuffled(loader.batches(0, 1), len(loader), config.data.eval_batch, config.seed)
    wanted = config.scan.bn_samples and batch_norm.norms(model)
    calibration = [*opened.calibration(config.scan.bn_samples)] if wanted else []
    prunable, _ = models.survey(model, config.prune.include, config.prune.exclude)
    statistics = prepare.statistics(opened, model, [tensor.name for tensor in prunable])
    return ScanInputs(model, saved.masks, batches, calibration, statistics)
