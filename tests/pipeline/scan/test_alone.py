"""One tensor alone, pruned to one level after another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.prune.allocation import Request, paper, threshold_counts
from pipeline.scan.alone import Alone
from pipeline.scan.inputs import ScanInputs
from pipeline.settings.config import parse_config
from pipeline.task.feed import Feed


def alone(criterion: str, weights: list[float], statistic: list[float]) -> Alone:
    config = parse_config({"name": "x", "prune": {"criterion": criterion}})
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([weights])
    known = {"0.weight": torch.tensor([statistic])}
    return Alone(
        ScanInputs(config.scan, config.prune, Feed.of(config), torch.device("cpu"), model, [], statistics=known),
        "0.weight",
    )


@pytest.mark.parametrize(
    ("criterion", "lowest"),
    [
        ("magnitude", 3.0),  # of |w| = 1, 4, 3, 2
        ("taylor", 4.0),  # of |w g| = 8, 4, 3, 2
        ("obs", 9.0),  # of w² h = 8, 16, 9, 4: it keeps 16 and 9
    ],
)
def test_a_quality_is_the_lowest_score_kept_in_deviations_of_the_weights(criterion: str, lowest: float) -> None:
    weights = [1.0, -4.0, 3.0, -2.0]
    found = alone(criterion, weights, [8.0, 1.0, 1.0, 1.0])
    found.plan([0.5])
    deviation = float(torch.tensor(weights).std(correction=0))
    assert found.quality(0) == pytest.approx(lowest / deviation)


def test_the_papers_thresholds_keep_what_the_level_kept_whatever_the_scores() -> None:
    """With quality × sigma as the threshold of its scores, a tensor keeps its two highest, not the two largest."""
    weights = [1.0, -4.0, 3.0, -2.0]
    found = alone("taylor", weights, [8.0, 1.0, 1.0, 1.0])
    found.plan([0.5])
    name, sigma = "0.weight", float(torch.tensor(weights).std(correction=0))
    scores = {name: torch.tensor([[8.0, 4.0, 3.0, 2.0]])}
    request = Request(
        scores, {name: torch.ones(1, 4, dtype=torch.bool)}, 2, {name: 0}, {name: 4}, {name: sigma},
        {name: found.quality(0)},
    )  # fmt: skip
    assert threshold_counts(request) == {name: 2} == paper(request)
