"""Connections of dead units leave the masks: by hand, and at random with equal outputs."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_network
from torch import Tensor, nn

from pipeline.network import dead


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight).double(), torch.tensor(bias).double()
    return layer


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p != 0 for n, p in model.named_parameters() if p.ndim > 1}


def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    made = copy.deepcopy(model).eval()
    for name, mask in masks.items():
        dict(made.named_parameters())[name].data[~mask] = 0
    return made


def test_a_unit_without_input_leaves_its_constant_and_one_without_output_its_inputs() -> None:
    first = linear([[1, 2], [0, 0], [3, 4]], [0.5, 2, 1])  # unit 1 is always 2
    second = linear([[1, 10, 0], [2, 20, 0]], [0.25, 0.75])  # unit 2 is read by nobody
    model = nn.Sequential(first, nn.ReLU(), second)
    left, notes = dead.remove(model, masks_of(model), torch.zeros(2, 2, dtype=torch.double), 1)
    assert notes == []
    assert left["0.weight"].tolist() == [[True, True], [False, False], [False, False]]
    assert left["2.weight"].tolist() == [[True, False, False], [True, False, False]]
    assert second.bias.tolist() == [20.25, 40.75]
    assert first.bias.tolist() == [0.5, 2, 1]


def test_death_travels() -> None:
    # Unit 1 of the first layer feeds unit 1 of the second alone, which nobody reads.
    model = nn.Sequential(
        linear([[1], [1]], [0, 0]), nn.ReLU(), linear([[1, 0], [0, 1]], [0, 0]), nn.ReLU(), linear([[1, 0]], [0])
    )
    left, _ = dead.remove(model, masks_of(model), torch.zeros(2, 1, dtype=torch.double), 1)
    assert [int(mask.sum()) for mask in left.values()] == [1, 1, 1]


def test_a_kept_weight_of_0_is_a_connection_and_the_floor_holds() -> None:
    model = nn.Sequential(linear([[0], [1]], [0, 0]), nn.ReLU(), linear([[1, 1]], [0]))
    everything = {name: torch.ones_like(mask) for name, mask in masks_of(model).items()}
    left, _ = dead.remove(model, everything, torch.zeros(2, 1, dtype=torch.double), 1)
    assert all(bool(mask.all()) for mask in left.values())
    floor, _ = dead.remove(model, masks_of(model), torch.zeros(2, 1, dtype=torch.double), 2)
    assert floor["2.weight"].tolist() == [[True, True]]  # one of the two would be dead


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear([[0], [1]], [1, 0]), linear([[1, 1]], [0])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(-x if x.sum() > 0 else x))


def test_a_network_that_cannot_be_followed_keeps_its_masks_and_says_so() -> None:
    model = Looks()
    left, notes = dead.remove(model, masks_of(model), torch.zeros(2, 1, dtype=torch.double), 1)
    assert all(torch.equal(left[name], mask) for name, mask in masks_of(model).items())
    assert "torch.fx cannot follow" in notes[0]
    assert model.second.bias.tolist() == [0]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_outputs_stay_and_nothing_more_can_go(seed: int) -> None:
    model = random_network(seed)
    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear) and part.bias is None:
            part.bias = nn.Parameter(torch.zeros(len(part.weight), dtype=torch.double))
    images = torch.randn(3, 2, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    before = masks_of(model)
    with torch.no_grad():
        expected = model(images)
        left, _ = dead.remove(model, before, images[:1], 0)
        assert all(not bool((left[name] & ~before[name]).any()) for name in before)
        torch.testing.assert_close(masked(model, left)(images), expected, rtol=1e-9, atol=1e-9)
        again, _ = dead.remove(masked(model, left), left, images[:1], 0)
    assert all(torch.equal(again[name], left[name]) for name in left)


def test_the_bias_of_a_unit_that_nobody_reads_becomes_0() -> None:
    first = linear([[1, 2], [0, 0], [3, 4]], [0.5, 2, 1])  # unit 1 is a constant that is read, unit 2 is not read
    second = linear([[1, 10, 0], [0, 0, 0]], [0.25, 0.75])  # the outputs of the network are always read
    model = nn.Sequential(first, nn.ReLU(), second)
    assert dead.silence(model, torch.zeros(2, 2, dtype=torch.double)) == (1, [])
    assert first.bias.tolist() == [0.5, 2, 0]
    assert second.bias.tolist() == [0.25, 0.75]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.05, 0.3]))
def test_silencing_changes_no_bit_of_the_output(seed: int, density: float) -> None:
    whole = random_network(seed)
    chance = torch.Generator().manual_seed(seed)
    kept = {n: torch.rand(p.shape, generator=chance) < density for n, p in whole.named_parameters() if p.ndim > 1}
    model = masked(whole, kept)
    images = torch.randn(3, 2, 9, 9, dtype=torch.double, generator=chance)
    with torch.no_grad():
        before = model(images)
        dead.silence(model, images[:1])
        assert torch.equal(model(images), before)
