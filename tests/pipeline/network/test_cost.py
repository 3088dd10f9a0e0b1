"""FLOPs, packed bytes and prices of small tensors, worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.base.errors import UserError
from pipeline.network import cost


def test_flops_are_two_for_each_weight_and_output_position() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    # The convolution has 18 weights and 4 x 4 positions, the linear layer 96 weights and one.
    assert cost.flops(network, (1, 4, 4)) == {"0.weight": 2 * 18 * 16, "2.weight": 2 * 96}


def test_a_group_sees_only_its_own_channels_and_a_second_call_counts_again() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.spare = nn.Conv2d(2, 2, 1, groups=2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    # Two weights, 9 positions, called twice; the layer that is never called has none.
    assert cost.flops(Twice(), (2, 3, 3)) == {"conv.weight": 2 * (2 * 2 * 9), "spare.weight": 0}


def test_an_input_that_does_not_fit_is_refused_and_modes_are_put_back() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).train()
    with pytest.raises(UserError, match=r"does not take an input of shape \(1, 3, 3\)"):
        cost.flops(network, (1, 3, 3))
    assert network.training


def test_packed_bytes_are_values_and_the_smaller_index() -> None:
    assert cost.packed_bytes(1000, 0) == 0
    assert cost.packed_bytes(1000, 1000) == 4000  # dense: no index
    assert cost.packed_bytes(800, 400) == 400 * 4 + 100  # a bit for each of 800 weights beats gaps of 2 on average
    assert cost.packed_bytes(100_000, 100) < 100 * 4 + 100_000 / 8  # gaps beat the bitmask where few are kept


@pytest.mark.parametrize(("quantity", "expected"), [("weights", 5), ("flops", 5 * 12), ("bytes", 5 * 4 + 2)])
def test_prices(quantity: cost.Quantity, expected: int) -> None:
    assert cost.price(quantity, 10, 120)(5) == expected
