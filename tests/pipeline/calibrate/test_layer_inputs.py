"""Rows of a layer's inputs, times its weight, are the layer's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.calibrate import layer_inputs


def outputs(layer: Any, inputs: Tensor) -> Tensor:
    """(groups, rows, outputs of a group), from rows and weight."""
    rows = layer_inputs.rows(layer, inputs, 0)
    found = rows @ layer_inputs.matrix(layer, layer.weight).mT
    return found if layer.bias is None else found + layer.bias.view(found.shape[0], 1, -1)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, 3), (2, 4, 6, 5)),
        (nn.Conv2d(4, 6, (3, 2), groups=2, stride=(2, 1), dilation=(1, 2), bias=False), (2, 4, 7, 6)),
        (nn.Conv2d(4, 8, 3, groups=4, padding="same", padding_mode="reflect"), (2, 4, 6, 5)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=(2, 1)), (2, 4, 6, 5)),
        (nn.Conv1d(4, 6, 3, groups=2, padding=1), (3, 4, 9)),
        (nn.Conv3d(2, 4, 2, groups=2, stride=2), (2, 2, 4, 5, 4)),
    ],
)
def test_a_convolution_is_its_rows_times_its_weight(layer: Any, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    expected = layer(inputs).flatten(2)  # (samples, outputs, positions)
    found = outputs(layer, inputs)
    samples, channels, positions = expected.shape
    by_group = found.view(layer.groups, samples, positions, -1).permute(1, 0, 3, 2)
    assert torch.allclose(by_group.reshape(samples, channels, positions), expected, atol=1e-5)


def test_a_linear_layer_has_a_row_for_each_token() -> None:
    layer = nn.Linear(4, 3)
    inputs = torch.randn(2, 5, 4)
    assert torch.allclose(outputs(layer, inputs).view(2, 5, 3), layer(inputs), atol=1e-5)


def test_of_many_positions_the_same_ones_are_drawn_in_every_sample() -> None:
    layer = nn.Conv2d(1, 1, 1)
    ramp = torch.arange(400.0).view(1, 1, 20, 20)
    rows = layer_inputs.rows(layer, torch.cat([ramp, ramp + 1000]), 7).view(2, -1)
    assert rows.shape[1] == layer_inputs.POSITIONS
    assert len(set(rows[0].tolist())) == layer_inputs.POSITIONS
    assert torch.equal(rows[1], rows[0] + 1000)
    assert not torch.equal(rows[0], layer_inputs.rows(layer, ramp, 8).view(-1))


def test_a_layer_that_computes_in_a_way_of_its_own_is_not_plain() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    class Named(nn.Linear):
        pass

    assert layer_inputs.is_plain(Named(2, 2))
    assert not layer_inputs.is_plain(Standardised(1, 1, 1))
