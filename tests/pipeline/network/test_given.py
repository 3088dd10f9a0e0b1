"""Networks given as objects are named by what they are, and copied each time that they are built."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.base.errors import UserError
from pipeline.network import given
from pipeline.network.build import build_network
from pipeline.settings.model import Model


def test_a_network_is_built_as_a_copy_while_it_is_held() -> None:
    network = small.network()
    with given.held(network) as settings:
        with given.held(copy.deepcopy(network)) as same:
            assert same == settings
        built, again = (build_network(Model(**settings), 10, seed) for seed in (0, 1))
        assert built is not network
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), network.parameters(), strict=True))
        with torch.no_grad():
            built.get_parameter("fc1.weight").zero_()
        assert again.get_parameter("fc1.weight").any()
        assert network.get_parameter("fc1.weight").any()
    with pytest.raises(UserError, match="was given as a Python object"):
        build_network(Model(**settings), 10)


def test_a_change_of_weights_layers_or_class_is_another_network() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    known = {given.digest(network)}
    other = copy.deepcopy(network)
    assert given.digest(other) in known
    with torch.no_grad():
        other.get_parameter("0.bias")[0] += 1
    known.add(given.digest(other))
    known.add(given.digest(nn.Sequential(network[0], nn.Sigmoid())))

    class Mine(nn.Sequential):
        pass

    known.add(given.digest(Mine(*network)))
    mine = Mine(*network)
    mine.scale = 2.0  # what its code computes with
    known.add(given.digest(mine))
    mine.get_parameter("0.weight").requires_grad_(False)
    known.add(given.digest(mine))
    assert len(known) == 6
    assert given.digest(mine.train()) == given.digest(mine.eval())


class Holds(nn.Module):
    """Computes with something that is neither a weight nor printed."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(2, 2), what
        nn.init.ones_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)


def test_networks_that_compute_with_other_things_are_others() -> None:
    held = [
        None, F.relu, F.tanh, F.gelu, torch.tanh, torch.sin, F.max_pool2d, F.adaptive_max_pool2d,
        functools.partial(F.leaky_relu, negative_slope=0.1), functools.partial(F.leaky_relu, negative_slope=0.2),
        lambda x: x + 1, lambda x: x + 2, lambda x: x.sin(), lambda x: x.cos(),
        (1, 2), (1, 3), [1, [2, 3]], [1, [2, 4]], {"act": F.relu}, {"act": F.tanh}, {1, 2}, {1, 3},
        torch.ones(2), torch.zeros(2), torch.zeros(2, dtype=torch.int64), (torch.ones(1),), (torch.zeros(1),),
        torch.float16, torch.float32, {"mean": torch.ones(3)}, {"mean": torch.zeros(3)},
    ]  # fmt: skip
    names = [given.digest(Holds(what)) for what in held]
    assert len(set(names)) == len(held)
    assert names == [given.digest(copy.deepcopy(Holds(what))) for what in held]


def test_a_buffer_that_is_not_saved_counts() -> None:
    networks = [nn.Linear(2, 2) for _ in range(3)]
    for number, network in enumerate(networks):
        network.load_state_dict(networks[0].state_dict())
        if number:
            network.register_buffer("kept", torch.full((2,), float(number)), persistent=False)
    assert len({given.digest(network) for network in networks}) == 3


def test_networks_without_such_things_keep_their_names() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, (3, 3)), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    assert given.digest(network) == "c3b65fa95d7311362bd89431"  # as every version has named it


def test_a_network_of_half_precision_has_a_digest() -> None:
    assert len(given.digest(nn.Linear(2, 2).to(torch.bfloat16))) == 24


def test_what_cannot_be_copied_is_one_sentence() -> None:
    network = nn.Linear(2, 2)
    network.kept = network(torch.ones(1, 2))  # of a graph: torch refuses to copy it
    with pytest.raises(UserError, match=r"model, a Linear, cannot be copied .* my_module:build"):
        given.copied(network)
    with pytest.raises(UserError, match=r"model is a dict, not a torch\.nn\.Module"):
        given.copied({})  # type: ignore[arg-type]
