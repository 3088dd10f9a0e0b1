"""Groups of channels: by hand on tiny networks, at random on random ones; what is left equals the small network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Fire, Patches, Residual, random_network, random_patches
from torch import Tensor, nn

from pipeline.network.compact import compact
from pipeline.network.groups import Groups, find
from pipeline.network.survey import survey


def groups_of(model: nn.Module, *shape: int, exclude: tuple[str, ...] = ()) -> Groups:
    example = torch.zeros(2, *shape, dtype=next(model.parameters()).dtype)
    prunable, _ = survey(model, exclude=exclude)
    return find(model, example, {tensor.name: tensor.shape for tensor in prunable})


def members(groups: Groups) -> dict[str, list[tuple[str, int, list[list[int]]]]]:
    return {
        name: [(each.tensor, each.axis, each.places.tolist()) for each in group.members]
        for name, group in groups.by_name.items()
    }


def test_a_chain_has_a_group_for_each_layer_but_the_last() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5))
    found = groups_of(model, 3)
    assert members(found) == {
        "0.weight": [("0.weight", 0, [[0], [1]]), ("2.weight", 1, [[0], [1]])],
        "2.weight": [("2.weight", 0, [[0], [1], [2], [3]]), ("4.weight", 1, [[0], [1], [2], [3]])],
    }
    assert found.notes == ()
    # One of two and three of four units: 3·1, 1·3 and 3·5 weights.
    assert found.counts({"0.weight": 1, "2.weight": 3}) == {"0.weight": 3, "2.weight": 3, "4.weight": 15}
    assert found.at_stake("0.weight") == 3 + 4
    masks = found.masks({"0.weight": np.array([False, True]), "2.weight": np.array([True, True, False, True])})
    assert masks["0.weight"].int().tolist() == [[0, 0, 0], [1, 1, 1]]
    assert masks["2.weight"].int().tolist() == [[0, 1], [0, 1], [0, 0], [0, 1]]
    assert masks["4.weight"].int().tolist() == [[1, 1, 0, 1]] * 5


def test_what_is_added_goes_together() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), Residual(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 3, padding=1))), nn.Flatten(),
        nn.Linear(8, 2),
    )  # fmt: skip
    found = members(groups_of(model, 1, 2, 2))
    assert found["0.weight"] == [
        ("0.weight", 0, [[0], [1]]),
        ("1.inner.0.weight", 1, [[0], [1]]),
        ("1.inner.1.weight", 0, [[0], [1]]),
        ("3.weight", 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # a channel is a block of features
    ]
    assert [name for name in found if name != "0.weight"] == ["1.inner.0.weight"]


def test_what_is_concatenated_is_two_groups() -> None:
    model = nn.Sequential(Fire(1, 2, 3, 4), nn.Conv2d(7, 2, 1))
    found = members(groups_of(model, 1, 4, 4))
    assert found["0.left.weight"][1] == ("1.weight", 1, [[0], [1], [2]])
    assert found["0.right.weight"][1] == ("1.weight", 1, [[3], [4], [5], [6]])


def test_biases_and_norms_go_with_the_channels_that_they_carry() -> None:
    found = groups_of(nn.Sequential(Fire(1, 2, 3, 4), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)), 1, 4, 4)
    carried = {
        name: {(each.tensor, each.axis): each.places.tolist() for each in group.carried}
        for name, group in found.by_name.items()
    }
    norm = [f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    assert carried == {
        "0.squeeze.weight": {("0.squeeze.bias", 0): [[0], [1]]},
        "0.left.weight": {("0.left.bias", 0): [[0], [1], [2]]} | {(each, 0): [[0], [1], [2]] for each in norm},
        "0.right.weight": {("0.right.bias", 0): [[0], [1], [2], [3]]}
        | {(each, 0): [[3], [4], [5], [6]] for each in norm},
    }
    kept = found.whole | {"0.left.weight": np.array([True, False, True]), "0.right.weight": np.arange(4) > 1}
    gone = {name: (sorted(rows), sorted(columns)) for name, (rows, columns) in found.gone(kept).items()}
    assert gone["1.running_var"] == ([1, 3, 4], [])
    assert gone["2.weight"] == ([], [1, 3, 4])
    assert gone["0.right.bias"] == ([0, 1], [])
    assert gone["0.squeeze.weight"] == ([], [])


def test_the_groups_of_a_convolution_keep_equally_many() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 2, 1))
    found = members(groups_of(model, 1, 4, 4))
    assert found["0.weight"] == [("0.weight", 0, [[0, 2], [1, 3]]), ("1.weight", 1, [[0], [1]])]
    assert found["1.weight"] == [("1.weight", 0, [[0, 3], [1, 4], [2, 5]]), ("2.weight", 1, [[0, 3], [1, 4], [2, 5]])]


def test_a_depthwise_layer_goes_with_what_it_reads() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 2, 1))
    found = members(groups_of(model, 1, 4, 4))
    assert found == {
        "0.weight": [
            ("0.weight", 0, [[0], [1]]), ("1.weight", 0, [[0, 1], [2, 3]]), ("2.weight", 1, [[0, 1], [2, 3]]),
        ]
    }  # fmt: skip


def test_a_tensor_that_stays_dense_keeps_its_channels() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.Linear(4, 5))
    found = groups_of(model, 3, exclude=("2.*",))
    assert list(found.by_name) == ["0.weight"]
    assert any("2.weight stays dense" in note for note in found.notes)


def test_a_step_that_cannot_be_followed_is_named() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(x, 1).values

    found = groups_of(nn.Sequential(nn.Linear(3, 2), Sorted(), nn.Linear(2, 2)), 3)
    assert found.by_name == {}
    assert any("sort" in note for note in found.notes)


def halved(model: nn.Module, found: Groups, seed: int) -> dict[str, Tensor]:
    """Masks that keep some units of each group, at random; at least one."""
    draw, kept = np.random.default_rng(seed), {}
    for name, group in found.by_name.items():
        kept[name] = draw.random(group.units) < 0.5
        kept[name][draw.integers(group.units)] = True
    masks = found.masks(kept)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == found.counts(
        {name: int(flags.sum()) for name, flags in kept.items()}
    )
    assert all(np.array_equal(flags, kept[name]) for name, flags in found.alive(masks).items())
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return masks


def check_small(model: nn.Module, masks: dict[str, Tensor], inputs: Tensor) -> nn.Module:
    """The compact network has the kept weights and no other, and gives the same answers."""
    small = compact(model, inputs).model
    left = dict(small.named_parameters())
    for name, mask in masks.items():
        assert left[name].numel() <= int(mask.sum())
    with torch.no_grad():
        assert torch.allclose(small(inputs), model(inputs), rtol=1e-9, atol=1e-9)
    return small


def test_hidden_units_on_tokens_are_groups_and_what_norms_touch_stays() -> None:
    found = groups_of(Patches([3, 5], nn.ReLU).eval(), 2, 9, 9)
    assert found.sizes == {"attention.in_proj_weight": 3, "blocks.0.wide.weight": 3, "blocks.1.wide.weight": 5}
    group = found.by_name["blocks.0.wide.weight"]
    assert [(each.tensor, each.axis) for each in group.members] == [
        ("blocks.0.wide.weight", 0),
        ("blocks.0.narrow.weight", 1),
    ]
    assert any("blocks.0.norm (LayerNorm)" in note for note in found.notes)


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_random_networks_on_patches_are_the_same_function_when_small(seed: int) -> None:
    model = random_patches(seed)
    inputs = torch.randn(3, 2, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    check_small(model, halved(model, groups_of(model, 2, 9, 9), seed), inputs)


@given(st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_random_networks_without_some_channels_are_the_same_function_when_small(seed: int) -> None:
    model = random_network(seed)
    found = groups_of(model, 2, 9, 9)
    inputs = torch.randn(3, 2, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    check_small(model, halved(model, found, seed), inputs)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("squeezenet1_1", 25),
        ("resnet18", 12),
        ("mobilenet_v2", 25),
        ("mobilenet_v3_small", 27),
        ("efficientnet_b0", 40),
    ],
)
def test_torchvision_networks_get_small(name: str, groups: int) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).double().eval()
    whole = copy.deepcopy(model)
    found = groups_of(model, 3, 64, 64)
    assert len(found.by_name) == groups
    assert found.notes == ()
    inputs = torch.randn(2, 3, 64, 64, dtype=torch.double)
    small = check_small(model, halved(model, found, 0), inputs)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (small, whole)]
    assert sizes[0] < 0.5 * sizes[1]
    assert type(small) is type(model)
