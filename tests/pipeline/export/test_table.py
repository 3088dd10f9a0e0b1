"""Tables of latencies, measured on a small network on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.export import latency, table
from pipeline.network.groups import Groups, find
from pipeline.network.survey import survey

SHAPE = (1, 8, 8)


def network() -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 16, 5),
    ).eval()  # fmt: skip
    nn.init.zeros_(model[1].weight)  # as residual networks begin: the channels are constant, and must not be removed
    shapes = {tensor.name: tensor.shape for tensor in survey(model)[0]}
    return model, find(model, torch.zeros(2, *SHAPE), shapes)


def test_the_first_network_is_whole_and_all_have_a_channel_of_each_group() -> None:
    _, groups = network()
    keeps = table.widths(groups)
    assert keeps[0] == {"0.weight": 16, "3.weight": 12} == groups.sizes
    assert len(keeps) == 1 + table.DRAWS * len(table.CENTRES)
    assert all(1 <= count <= groups.sizes[name] for keep in keeps for name, count in keep.items())
    assert keeps == table.widths(groups)


def test_a_network_that_is_timed_has_the_widths_asked_for() -> None:
    model, groups = network()
    small = table.shrunk(model, groups, {"0.weight": 5, "3.weight": 2}, torch.zeros(2, *SHAPE))
    shapes = {name: tuple(parameter.shape) for name, parameter in small.named_parameters()}
    assert shapes["0.weight"] == (5, 1, 3, 3)
    assert shapes["1.weight"] == (5,)
    assert shapes["3.weight"] == (2, 5, 3, 3)
    assert shapes["6.weight"] == (5, 2 * 16)
    assert model[1].weight.detach().tolist() == [0.0] * 16  # which stays as it is


def test_each_step_of_each_network_has_a_time() -> None:
    model, groups = network()
    passes = latency.Passes(repeats=2, warmup=1)
    made = table.measure(model, groups, SHAPE, torch.device("cpu"), "here", batch=3, passes=passes)
    assert (made.device, made.batch, made.network) == ("here", 3, table.network(groups, SHAPE))
    assert [each.keep for each in made.timed] == table.widths(groups)
    steps = {step.name for step in groups.steps}
    assert all(each.steps.keys() == steps and each.ms > 0 for each in made.timed)
    assert all(ms >= 0 for each in made.timed for ms in each.steps.values())


def by_shape(x: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    return x.view(samples, channels * height * width)


@pytest.mark.parametrize("flat", [lambda x: x.view(x.size(0), -1), by_shape])
def test_only_steps_of_the_groups_have_times(flat: Callable[[Tensor], Tensor]) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 5)

        def forward(self, x: Tensor) -> Any:
            return self.second(flat(torch.relu(self.first(x))))

    model = Views().eval()
    groups = find(model, torch.zeros(2, *SHAPE), {tensor.name: tensor.shape for tensor in survey(model)[0]})
    assert groups.sizes == {"first.weight": 4}
    passes = latency.Passes(repeats=1, warmup=0)
    made = table.measure(model, groups, SHAPE, torch.device("cpu"), "here", passes=passes)
    assert all(each.steps.keys() == {step.name for step in groups.steps} for each in made.timed)


def test_a_network_is_told_from_another_by_its_widths_and_inputs() -> None:
    _, groups = network()
    assert table.network(groups, SHAPE) == table.network(network()[1], SHAPE)
    assert table.network(groups, SHAPE) != table.network(groups, (1, 9, 9))
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 5))
    other = find(model, torch.zeros(2, *SHAPE), {tensor.name: tensor.shape for tensor in survey(model)[0]})
    assert table.network(groups, SHAPE) != table.network(other, SHAPE)
