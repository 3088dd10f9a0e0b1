"""Networks cut out of whole ones: by hand on tiny ones; at random, training in the small network is masked training."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import OPEN_FORMS, Head, random_network, random_patches
from test_groups import groups_of, halved
from torch import Tensor, nn

from pipeline.network.layers import DROPOUTS
from pipeline.network.shrink import Small, shrink
from pipeline.prune.masks import Applier

STEPS = 3


def test_rows_columns_biases_and_norms_are_cut_and_put_back() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.PReLU(3), nn.Linear(3, 2))
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.ndim:
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 10 * number)
    before = copy.deepcopy(model.state_dict())
    groups = groups_of(model, 2)
    masks = groups.masks({"0.weight": torch.tensor([True, False, True]).numpy()})
    small = shrink(model, groups, masks)
    assert {name: [lines.tolist() for lines in places] for name, places in small.places.items()} == {
        "0.weight": [[0, 2], [0, 1]], "3.weight": [[0, 1], [0, 2]],
        **{name: [[0, 2]] for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "2.weight")},
    }  # fmt: skip
    assert (small.model[0].out_features, small.model[1].num_features, small.model[3].in_features) == (2, 2, 2)
    assert small.model[0].weight.tolist() == [[0, 1], [4, 5]]
    assert small.model[3].weight.tolist() == [[80, 82], [83, 85]]
    assert {name: mask.shape for name, mask in small.cut(masks).items()} == {"0.weight": (2, 2), "3.weight": (2, 2)}
    assert all(bool(mask.all()) for mask in small.cut(masks).values())
    with torch.no_grad():
        for tensor in small.model.state_dict().values():
            tensor.add_(100)
    back = small.put_back(model.state_dict())
    assert back["0.weight"].tolist() == [[100, 101], [0, 0], [104, 105]]
    assert back["0.bias"].tolist() == [110, 0, 112]
    assert back["1.running_var"].tolist() == [150, 0, 152]
    assert int(back["1.num_batches_tracked"]) == 100
    assert back["3.weight"].tolist() == [[180, 0, 182], [183, 0, 185]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_networks_that_are_cut_alike_have_one_digest() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    groups = groups_of(model, 2)

    def digest(*kept: bool) -> str:
        return shrink(model, groups, groups.masks({"0.weight": torch.tensor(kept).numpy()})).digest

    assert digest(True, False, True) == digest(True, False, True)
    assert len({digest(True, False, True), digest(True, True, False), digest(True, True, True)}) == 3


def test_a_layer_under_two_names_and_one_that_is_fixed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
            self.layers = nn.ModuleList([self.first, self.second])

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(torch.relu(self.first(x)))
            return logits

    model = Twice()
    model.first.weight.requires_grad_(False)
    groups = groups_of(model, 2)
    masks = halved(model, groups, 0)
    small = shrink(model, groups, masks)
    assert small.model.layers[0] is small.model.first
    assert not small.model.first.weight.requires_grad
    assert small.model.second.weight.requires_grad
    back = small.put_back(model.state_dict())
    assert all(torch.equal(back[name], model.state_dict()[name]) for name in ("first.weight", "second.weight"))
    assert all(torch.equal(back[name], back[name.replace("layers.0", "first")]) for name in back if "layers.0" in name)
    assert torch.equal(back["first.bias"] != 0, masks["first.weight"].any(1))


def trained(model: nn.Module, inputs: Tensor, masks: dict[str, Tensor]) -> nn.Module:
    """The network after steps of SGD with momentum, decay and masks, in training mode."""
    model.train()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    applier = Applier([parameters[name].data for name in masks], [*masks.values()])
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(inputs).tanh().square().sum().backward()
        optimizer.step()
        applier.apply()
    return model.eval()


def check_training(model: nn.Module, inputs: Tensor, seed: int) -> Small:
    """Training in the small network, put back, is training of the masked one; where it goes has no effect."""
    for part in model.modules():
        if isinstance(part, DROPOUTS):
            part.p = 0.0  # else the two draw different numbers
        if isinstance(part, nn.ReLU):
            part.inplace = False  # gradients need what some of these blocks would overwrite
        if isinstance(part, Head):
            part.how = part.how.replace("hard", "flatten")
    groups = groups_of(model, *inputs.shape[1:])
    masks = halved(model, groups, seed)
    small = shrink(model, groups, masks)
    assert sum(parameter.numel() for parameter in small.model.parameters()) < sum(
        parameter.numel() for parameter in model.parameters()
    ) or all(bool(mask.all()) for mask in masks.values())
    with torch.no_grad():
        torch.testing.assert_close(small.model.eval()(inputs), model(inputs), rtol=1e-9, atol=1e-9)
    back = copy.deepcopy(model)
    trained(small.model, inputs, small.cut(masks))
    back.load_state_dict(small.put_back(model.state_dict()))
    for name, mask in masks.items():
        assert not back.get_parameter(name)[~mask].any()
    again = shrink(back, groups, masks)
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in small.model.state_dict().items())
    trained(model, inputs, masks)
    with torch.no_grad():
        wanted = model(inputs)
        torch.testing.assert_close(small.model(inputs), wanted, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(back.eval()(inputs), wanted, rtol=1e-7, atol=1e-7)
    after = small.cut(model.state_dict())  # of the masked network
    for name, tensor in small.model.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-7, atol=1e-7, msg=name)
    return small


@given(st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_random_networks_learn_the_same_when_small(seed: int) -> None:
    model = random_network(seed)
    check_training(model, torch.randn(3, 2, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1)), seed)


@given(st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_random_networks_on_patches_learn_the_same_when_small(seed: int) -> None:
    model = random_patches(seed, OPEN_FORMS)
    check_training(model, torch.randn(3, 2, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(1)), seed)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_torchvision_networks_learn_the_same_when_small(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10).double().eval()
    inputs = torch.randn(4, 3, 64, 64, dtype=torch.double)
    small = check_training(model, inputs, 0)
    assert type(small.model) is type(model)
