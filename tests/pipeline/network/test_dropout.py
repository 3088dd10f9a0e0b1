"""Dropout at retraining: whose connections count, and the paper's rate from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline.network import dropout
from pipeline.network.paper_networks import alexnet_caffe


def layers(**parts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(parts))


def test_half_becomes_015_at_9_percent() -> None:
    model = layers(fc1=nn.Linear(20, 10), relu=nn.ReLU(), drop=nn.Dropout(0.5), fc2=nn.Linear(10, 3))
    keep = {"fc1.weight": 18, "fc2.weight": 30}
    assert dropout.corrected_rates(model, keep) == {"drop": pytest.approx(0.15)}


def test_a_dropout_of_no_pruned_layer_stays_as_it_is() -> None:
    model = layers(first=nn.Dropout(0.2), fc1=nn.Linear(4, 4), drop=nn.Dropout(0.3), fc2=nn.Linear(4, 2))
    assert dropout.owners(model) == {"first": [], "drop": ["fc1.weight"]}
    assert dropout.corrected_rates(model, {"fc2.weight": 1}) == {"first": 0.2, "drop": 0.3}


class Branches(nn.Module):
    """Two layers' outputs side by side, then dropout; `looks` adds code that torch.fx cannot follow."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.left, self.right, self.last = nn.Linear(4, 2), nn.Linear(4, 6), nn.Linear(8, 2)
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.sum() > 0:
            x = -x
        return self.last(self.drop(torch.cat([self.left(x), self.right(x)], 1).relu()))


def test_where_layers_meet_their_connections_count_together() -> None:
    keep = {"left.weight": 2, "right.weight": 6}
    assert dropout.corrected_rates(Branches(False), keep) == {"drop": 0.25}  # 8 of 32


def test_a_network_that_cannot_be_followed_keeps_its_rates() -> None:
    keep = {"left.weight": 2, "right.weight": 6}
    assert dropout.owners(Branches(True)) == {"drop": []}
    assert dropout.corrected_rates(Branches(True), keep) == {"drop": 0.5}


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (alexnet_caffe, {"drop6": ["fc6.weight"], "drop7": ["fc7.weight"]}),
        (
            torchvision.models.alexnet,  # its first dropout acts on the last convolution's outputs
            {"classifier.0": ["features.10.weight"], "classifier.3": ["classifier.1.weight"]},
        ),
        (
            torchvision.models.squeezenet1_1,
            {"classifier.0": ["features.12.expand1x1.weight", "features.12.expand3x3.weight"]},
        ),
    ],
)
def test_the_owners_in_known_networks(build: Callable[[], nn.Module], expected: dict[str, list[str]]) -> None:
    with torch.device("meta"):
        found = dropout.owners(build())
    assert {path: sorted(names) for path, names in found.items()} == expected


def test_the_dense_rates_come_back() -> None:
    model = layers(fc=nn.Linear(2, 2), drop=nn.Dropout(0.5))
    with dropout.use(model, {"drop": 0.1}):
        assert dropout.rates(model) == {"drop": 0.1}
    assert dropout.rates(model) == {"drop": 0.5}
