"""A plan's estimate of time tries few steps, and fewer of a network whose step takes long."""

from __future__ import annotations

import time

import pytest
from tiny_run import TINY, merged
from torch import Tensor, nn

from pipeline.rounds import duration, outlook
from pipeline.settings.config import parse_config
from pipeline.train.first_step import Tries

forwards: list[int] = []  # the images of each batch that the network below was given


class Slow(nn.Module):
    """A linear network whose forward takes a quarter of a second."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        forwards.append(len(x))
        time.sleep(0.25)
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    ("taken", "over"),
    [([], False), ([9.0], False), ([2.0, 2.9], False), ([2.0, 3.0], True), ([2.0, 1.0, 2.1], True), ([0.1] * 4, True)],
)
def test_no_step_is_begun_after_the_patience(taken: list[float], over: bool) -> None:
    assert Tries(4, 5.0, taken).over == over


@pytest.mark.parametrize(("shrink", "control", "rounds"), [(False, True, 8), (False, False, 4), (True, True, None)])
def test_a_round_of_a_small_network_is_reckoned_with_its_flops(shrink: bool, control: bool, rounds: int | None) -> None:
    """Four rounds to a quarter of the FLOPs; the dense network is given."""
    prune = {"pattern": "channels", "allocation": "uniform", "rounds": 4, "dense_control": control}
    changes = {"prune": {**prune, "shrink_between_rounds": shrink}, "target": {"compression": 4, "budget": "flops"}}
    config = parse_config(merged({**TINY, **changes}, {"dense.epochs": 0, "model.trained": True}))
    plan = outlook.make(config)
    outline = outlook.outline(config, plan.counts, ["dense", "rounds", "final"], len(plan.prunable))
    needs = duration.of(config, plan, outline)
    assert needs.seconds is not None
    assert needs.per_image_s is not None
    if rounds is None:  # each round keeps the same share of the one before it
        rounds_of_dense = sum(row.flops for row in plan.rounds) / sum(plan.flops.values())
        assert rounds_of_dense == pytest.approx(0.707 + 0.5 + 0.354 + 0.25, rel=0.02)
        assert needs.seconds / needs.per_image_s == pytest.approx(outline.round * (rounds_of_dense + 4))
    else:
        assert needs.seconds / needs.per_image_s == pytest.approx(outline.round * rounds)


@pytest.mark.parametrize(("patience", "steps"), [(0.1, 2), (0.7, 3), (60.0, 4)])
def test_a_slow_network_is_tried_few_times(patience: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "PATIENCE_S", patience)
    forwards.clear()
    config = parse_config({**TINY, "model": {"factory": f"{__name__}:Slow"}})
    each = duration.per_image_s(config, "dense", config.dense, 10)
    assert forwards == [2] * steps
    assert each >= 0.125
