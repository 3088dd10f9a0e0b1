"""Dead units go and the outputs stay: by hand on tiny networks, at random on random ones, on real ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Fire, OnTokens, Residual, damage, random_network, random_patches
from torch import Tensor, nn

from pipeline.network.compact import Compacted, compact
from pipeline.network.logits import of_logits
from pipeline.network.paper_networks import lenet_5
from pipeline.network.weights import load_weights


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def difference(model: nn.Module, smaller: nn.Module, inputs: Tensor) -> float:
    """Largest difference of outputs, as a share of the largest output (or of 1)."""
    with torch.no_grad():
        wanted, got = model(inputs), smaller(inputs)
    assert wanted.shape == got.shape
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1))


def shrunk(model: nn.Module, *shape: int) -> Compacted:
    """compact(), having checked that the outputs are equal, that nothing grew and that nothing more can go."""
    model = model.double().eval()
    inputs = torch.randn(3, *shape, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * 3
    before = copy.deepcopy(model.state_dict())
    found = compact(model, inputs[:1])
    assert difference(model, found.model, inputs) < 1e-9
    assert parameters(found.model) <= parameters(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d) and part.groups > 1]
    if all(part.groups == part.in_channels == part.out_channels for part in convolutions):
        # Others may end as another kind (one channel a group: depthwise; one group: ordinary), of which more can go.
        assert sum(compact(found.model, inputs).removed.values()) == 0, "not at a fixed point"
    return found


def linear(weight: list[list[float]], bias: list[float] | None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def test_a_unit_without_inputs_becomes_a_bias_and_one_without_outputs_goes() -> None:
    first = linear([[1, 2], [0, 0], [3, 4], [0, 0]], [0.5, 2, 1, -2])  # unit 1 is always 2, unit 3 always -2
    second = linear([[1, 10, 0, 7], [2, 20, 0, 7]], [0.25, 0.75])  # unit 2 is read by nobody
    found = shrunk(nn.Sequential(first, nn.ReLU(), second), 2)
    assert found.removed == {"0": 3, "2": 0}
    assert found.kept_units == {"0": 1, "2": 2}
    assert found.notes == []
    small = found.model
    assert type(small) is nn.Sequential
    assert small[0].weight.tolist() == [[1, 2]]
    assert small[2].weight.tolist() == [[1], [2]]
    assert small[2].bias.tolist() == [20.25, 40.75]  # 0.25 + 10*relu(2) + 7*relu(-2)
    assert (small[0].out_features, small[2].in_features) == (1, 1)


def test_a_bias_is_made_where_there_was_none() -> None:
    found = shrunk(nn.Sequential(linear([[0], [1]], [3, 0]), linear([[2, 1]], None)), 1)
    assert found.model[1].bias.tolist() == [6]


def test_death_travels_through_layers() -> None:
    # Unit 0 of the first layer feeds unit 0 of the second alone, which nobody reads.
    layers = [linear([[1], [1]], [0, 0]), linear([[1, 0], [0, 1]], [0, 0]), linear([[0, 1]], [0])]
    found = shrunk(nn.Sequential(*layers), 1)
    assert found.removed == {"0": 1, "1": 1, "2": 0}


def test_a_layer_keeps_one_unit_and_outputs_are_never_removed() -> None:
    found = shrunk(nn.Sequential(linear([[1], [1]], [1, 1]), linear([[0, 0], [0, 0]], [5, 6])), 1)
    assert found.removed == {"0": 1, "1": 0}


def test_a_batch_norm_turns_a_constant_into_another_and_shrinks_along() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].running_mean.copy_(torch.tensor([1.0, -3.0, 2.0]))
        model[1].weight[2] = 0  # the norm silences channel 2 too: always its bias
        model[1].bias.fill_(1)
    found = shrunk(model, 1, 4, 4)
    assert found.removed == {"0": 2, "3": 0}
    assert found.model[1].num_features == 1
    assert len(found.model[1].running_var) == 1


@pytest.mark.parametrize(("bias", "mode", "gone"), [(0.0, "zeros", 1), (2.0, "zeros", 0), (2.0, "replicate", 1)])
def test_before_a_padded_convolution_only_zeros_go(bias: float, mode: str, gone: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = bias
    found = shrunk(model, 1, 5, 5)
    assert found.removed["0"] == gone
    assert [("1: 1 constant inputs" in note) for note in found.notes] == ([] if gone else [True])


def test_a_residual_channel_goes_only_where_all_its_branches_may() -> None:
    inner = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), Residual(inner), nn.Conv2d(3, 1, 1))
    with torch.no_grad():
        model[0].weight[0], inner.weight[0] = 0, 0  # channel 0 is constant in both, their sum too
        inner.weight[1] = 0  # channel 1 in one only
    found = shrunk(model, 1, 4, 4)
    assert found.removed == {"0": 1, "1.inner": 1, "2": 0}


def test_concatenation_keeps_its_offsets() -> None:
    model = nn.Sequential(Fire(2, 3, 2, 4), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[0].left.weight[1] = 0
        model[0].right.weight[3] = 0
        model[1].weight[:, 2] = 0
        model[0].squeeze.weight[2], model[0].squeeze.bias[2] = 0, -1
    found = shrunk(model, 2, 5, 5)
    assert found.removed == {"0.squeeze": 1, "0.left": 1, "0.right": 2, "1": 0}


def test_depthwise_channels_go_with_their_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[1].weight[2:4] = 0
    found = shrunk(model, 1, 5, 5)
    assert found.removed == {"0": 1, "1": 2, "2": 0}
    assert (found.model[1].groups, found.model[1].out_channels, found.model[1].in_channels) == (2, 4, 2)


def test_grouped_convolutions_keep_equal_groups() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight[[0, 1, 3]] = 0  # two dead in the first group, one in the second
        model[2].weight[:, 0] = 0
    found = shrunk(model, 1, 3, 3)
    assert found.removed == {"0": 2, "1": 0, "2": 0}
    assert (found.model[1].groups, found.model[1].in_channels) == (2, 4)


def test_pooling_and_flatten_turn_a_channel_into_a_block_of_features() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[3].weight[:, 18:] = 0
        model[3].weight[0, 19] = 1.0  # one feature of channel 2 is still read
    found = shrunk(model, 1, 8, 8)
    assert found.removed == {"0": 1, "3": 0}
    assert found.model[3].in_features == 18


class Flattening(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.way = nn.Conv2d(1, 3, 3), nn.Linear(12, 2), way

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.way(self.conv(x)))


@pytest.mark.parametrize(
    ("way", "graph"),
    [
        (lambda x: x.view(-1, 12), True),
        (lambda x: x.view(x.size(0), -1), False),
        (lambda x: x.reshape((x.shape[0], -1)), False),
        (lambda x: x.view(x.size(0), x.size(1) * x.size(2) * x.size(3)), False),
        (lambda x: x.flatten(1), False),
    ],
)
def test_every_usual_way_to_flatten_is_followed(way: Callable[[Tensor], Tensor], graph: bool) -> None:
    model = Flattening(way)
    with torch.no_grad():
        model.conv.weight[1] = 0
    found = shrunk(model, 1, 4, 4)
    assert found.removed == {"conv": 1, "fc": 0}
    assert isinstance(found.model, torch.fx.GraphModule) == graph == bool(found.flattened)


class Odd(nn.Module):
    """One convolution before and one after a step; channel 1 is dead everywhere."""

    def __init__(self, step: Callable[[Tensor], Tensor], inside: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second, self.step, self.inside = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1), step, inside
        with torch.no_grad():
            self.first.weight[1] = 0
            self.second.weight[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(self.first(x))
        return self.second(x if self.inside is None else self.inside(x))


@pytest.mark.parametrize(
    ("step", "word"),
    [
        (lambda x: torch.softmax(x, 1), "softmax"),
        (lambda x: x.roll(1, 1), "roll"),
        (lambda x: x + torch.arange(4).view(4, 1, 1), "add"),
        (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), "getitem"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk"),
        (lambda x: torch.cat(x.split(2, 1), 1), "split"),
        (lambda x: x * x.size(1), "mul"),
        (lambda x: torch.dropout(x, 0.5, False), "dropout"),
    ],
)
def test_what_cannot_be_followed_is_left_alone_and_named(step: Callable[[Tensor], Tensor], word: str) -> None:
    found = shrunk(Odd(step), 1, 3, 3)
    assert found.removed == {"first": 0, "second": 0}
    assert any(word in note and "left alone" in note for note in found.notes)


def test_a_step_in_place_is_seen_by_later_readers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear([[0], [1]], [-3, 0]), linear([[1, 1]], [0])

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = torch.relu_(x)
            return self.b(x) + y.sum(1, keepdim=True)  # x is not -3 any more

    shrunk(Twice(), 1)


def test_code_that_looks_into_its_tensors_is_left_alone() -> None:
    class Loops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for size in x.shape[2:]:
                x = x * size
            return x if x.sum() > 0 else -x

    found = shrunk(Odd(nn.Identity(), Loops()), 1, 3, 3)
    assert found.removed == {"first": 0, "second": 0}
    assert any("inside (Loops)" in note for note in found.notes)
    whole = shrunk(nn.Sequential(nn.Linear(2, 2), Loops()), 2)
    assert whole.removed == {"0": 0}


class Looking(Odd):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)


def test_a_network_that_cannot_be_traced_at_all_is_returned_whole() -> None:
    found = shrunk(Looking(nn.ReLU()), 1, 3, 3)
    assert found.removed == {"first": 0, "second": 0}
    assert "whole network is left alone" in found.notes[0]


def test_shared_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[1] = 0
    found = shrunk(model, 4)
    assert sum(found.removed.values()) == 0
    assert any("shares its weights" in note for note in found.notes)
    layer = nn.Linear(4, 4)
    again = shrunk(nn.Sequential(layer, nn.ReLU(), layer), 4)
    assert any("called more than once" in note for note in again.notes)


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_random_networks_stay_the_same_function(seed: int) -> None:
    shrunk(random_network(seed), 2, 9, 9)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_random_networks_on_patches_stay_the_same_function(seed: int) -> None:
    shrunk(random_patches(seed), 2, 9, 9)


def test_hidden_units_between_linear_layers_on_tokens_go() -> None:
    block = OnTokens(2, 3, nn.ReLU())
    with torch.no_grad():
        block.wide.weight[1] = 0  # unit 1 is always its bias
        block.narrow.weight[:, 2] = 0  # unit 2 is read by nobody
    found = shrunk(nn.Sequential(block), 5, 2)
    assert found.removed == {"0.wide": 2, "0.narrow": 0}


@pytest.mark.parametrize("put", [lambda *both: both, lambda one, other: SimpleNamespace(logits=one, features=other)])
def test_a_network_of_several_outputs_shrinks_to_one_of_logits(put: Callable[[Tensor, Tensor], object]) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 1), nn.Linear(36, 2)

        def forward(self, x: Tensor) -> object:
            x = torch.relu(self.first(x))
            return put(self.second(x.view(-1, 36)), x)

    model = Several()
    with torch.no_grad():
        model.first.weight[:2], model.first.bias[:2] = 0, 0
    found = shrunk(of_logits(model), 1, 3, 3)
    assert found.removed == {"first": 2, "second": 0}
    assert copy.deepcopy(found.model)(torch.ones(5, 1, 3, 3, dtype=torch.double)).shape == (5, 2)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_torchvision_networks_stay_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    damage(model, 5)
    found = shrunk(model, 3, 64, 64)
    assert parameters(found.model) < 0.8 * parameters(model)
    assert type(found.model) is type(model)


def test_the_real_lenet_pruned_twelvefold(real_data: Path) -> None:
    model = lenet_5().eval()
    load_weights(model, real_data / "weights/lenet5_caffe_mnist.pth")
    with torch.no_grad():
        weights = [part.weight for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        pooled = torch.cat([(w / w.std()).abs().flatten() for w in weights])
        limit = pooled.kthvalue(len(pooled) - len(pooled) // 12).values
        for weight in weights:
            weight[(weight / weight.std()).abs() <= limit] = 0
    images = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    found = compact(model, images)
    assert difference(model, found.model, images) < 1e-5
    assert sum(found.removed.values()) > 0
    assert found.notes == []
