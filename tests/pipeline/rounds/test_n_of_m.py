"""Whole runs with prune.pattern=n:m: every group keeps to it, after each round and in what is handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline import stages
from pipeline.local import LocalEngine
from pipeline.run.events import unheard
from pipeline.run.layout import round_folder
from pipeline.run.state import Run, run_root
from pipeline.settings.config import Config
from pipeline.train import checkpoint
from pipeline.train.world import World

ALONE = World(0, 1, torch.device("cpu"))
SMALL = {"tracking.enabled": False, "prune.dense_control": False, "dense.epochs": 1, "retrain.epochs": 1}


def fits(weight: torch.Tensor, n: int, m: int) -> bool:
    return all(int((part != 0).sum(1).max()) <= n for part in weight.split(m, dim=1))


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("2:4", {"prune.allocation": "uniform", "target.compression": 2}),
        ("2:4", {"prune.allocation": "uniform", "target.compression": 4, "prune.rounds": 2}),
        ("1:4", {"prune.allocation": "pooled", "prune.gradual": 0.5, "prune.dead_neurons": True}),
        ("4:8", {"prune.allocation": "budget", "scan.levels": [0.5, 0.2], "scan.together": [0.3]}),
    ],
)
def test_every_round_keeps_to_the_pattern(tiny: Callable[..., Config], pattern: str, more: dict[str, Any]) -> None:
    config = tiny(**SMALL, **{"prune.rounds": 1, "target.compression": 6, "prune.pattern": pattern, **more})
    result = stages.run(config, LocalEngine(ALONE), unheard)
    n, m = map(int, pattern.split(":"))
    run = Run(run_root(config), 0)
    for number in range(1, config.prune.rounds + 1):
        saved = checkpoint.load(run, f"{round_folder(number)}/checkpoint")
        for name, mask in saved.masks.items():
            assert fits(mask, n, m), (number, name)
            assert fits(saved.weights[name], n, m), (number, name)
    assert result.compression == pytest.approx(config.target.compression, rel=0.02)
