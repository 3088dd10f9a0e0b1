"""A plan's estimate of time tries few steps, and fewer of a network whose step takes long."""

from __future__ import annotations

import time

import pytest
from tiny_run import TINY
from torch import Tensor, nn

from pipeline.rounds import duration
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


@pytest.mark.parametrize(("patience", "steps"), [(0.1, 2), (0.7, 3), (60.0, 4)])
def test_a_slow_network_is_tried_few_times(patience: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duration, "PATIENCE_S", patience)
    forwards.clear()
    config = parse_config({**TINY, "model": {"factory": f"{__name__}:Slow"}})
    each = duration.per_image_s(config, "dense", config.dense, 10)
    assert forwards == [2] * steps
    assert each >= 0.125
