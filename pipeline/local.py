"""The engine without Ray: this process alone, or all processes that torchrun started."""

from __future__ import annotations

import json
from typing import Any

import torch

from pipeline import config as settings
from pipeline.config import Config
from pipeline.data.loader import Batch, EvalLoader
from pipeline.distributed import World
from pipeline.engine import OnLevel, Trials, work
from pipeline.prune import sensitivity
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

    def scan(self, todo: Trials, config: Config, run: Run, on_level: OnLevel) -> dict[str, float]:
        """Measure tensor after tensor in this process."""
        opened = open_session(config, World(0, 1, self.world.device), run, lambda event: None)
        model, batches, calibration = scan_inputs(opened)
        dense = sensitivity.accuracy(model, batches, config, self.world.device)
        for name, levels in todo.items():
            densities = [level["density"] for level in levels]
            for level in sensitivity.scan_tensor(
                model, name, densities, batches, config, self.world.device, calibration
            ):
                on_level(name, sensitivity.as_dict(level))
        return dense

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


def scan_inputs(opened: Session) -> tuple[torch.nn.Module, list[Batch], list[Batch]]:
    """The dense network, the val batches (uint8) that every level of the scan is measured on, and those of train that
    batch norm is calibrated on."""
    config = opened.config
    model = opened.new_model()
    model.load_state_dict(checkpoint.load(opened.run, "dense/checkpoint").weights)
    loader = EvalLoader(opened.split("val"), config.data, limit=config.scan.samples, seed=config.seed)
    wanted = config.scan.bn_samples and batch_norm.norms(model)
    calibration = [*opened.calibration(config.scan.bn_samples)] if wanted else []
    return model, [*loader.batches(0, 1)], calibration
