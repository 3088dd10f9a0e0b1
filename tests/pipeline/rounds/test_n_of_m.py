"""Whole runs with prune.pattern=n:m: every group keeps to it, after each round and in what is handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline import stages
from pipeline.base.errors import UserError
from pipeline.local import LocalEngine
from pipeline.prune import round_plan
from pipeline.rounds import outlook
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
        ("2:4", {"prune.allocation": "uniform", "target.compression": 6, "prune.rounds": 2}),
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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"target.compression": 2, "prune.rounds": 3}, "3 rounds plan as many or more.*set prune.rounds=1"),
        ({"target.compression": 4, "prune.rounds": 4}, "2 rounds plan as many or more.*set prune.rounds=3"),
        ({"target.compression": 1.5, "prune.rounds": 1}, "above the [0-9,]+ .*within prune.ceilings and prune.pattern"),
        (
            {"prune.floors": {"fc1.weight": 0.9}, "prune.rounds": 1},
            "prune.floors gives fc1.weight 0.9 .* allows it 0.5",
        ),
        ({"prune.allocation": "explicit", "prune.densities": {"fc*": 0.7}}, "prune.densities gives fc1.weight 0.7"),
        ({"target.mode": "no-loss", "target.compression": None}, "target.mode=no-loss finds the densities itself"),
    ],
)
def test_what_the_pattern_rules_out_is_refused_before_anything_is_trained(
    tiny: Callable[..., Config], more: dict[str, Any], said: str
) -> None:
    config = tiny(**SMALL, **{"prune.pattern": "2:4", "prune.allocation": "uniform", **more})
    with pytest.raises(UserError, match=said):
        outlook.make(config)


def test_gradual_pruning_comes_down_to_the_pattern_little_by_little(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"prune.pattern": "2:4", "prune.allocation": "uniform", "prune.gradual": 0.5})
    shape = (8, 8)
    weights, everything = {"w": torch.rand(shape)}, {"w": torch.ones(shape, dtype=torch.bool)}
    basis = round_plan.Basis(config.prune, config.target, 0, weights, None)
    last = round_plan.Goal(1, 1, 0.25, 16, 1)
    kept = [
        round_plan.make(basis, goal, round_plan.Standing(weights, everything)).keep["w"]
        for goal in (last.at(1.0), last.at(0.75), last.at(0.5), last)
    ]
    assert kept == [64, 48, 32, 16]
    assert round_plan.make(
        basis, round_plan.Goal(1, 1, 0.75, 48, 1), round_plan.Standing(weights, everything)
    ).keep == {"w": 32}


def test_a_plan_shows_what_the_pattern_keeps(tiny: Callable[..., Config]) -> None:
    settings = {"prune.pattern": "2:4", "prune.rounds": 3, "target.compression": 4}
    config = tiny(**SMALL, **{**settings, "prune.allocation": "pooled"})
    assert [round(each.density, 2) for each in outlook.make(config).rounds] == [0.5, 0.4, 0.25]
