"""Networks given as objects are named by what they are, and copied each time that they are built."""

from __future__ import annotations

import copy

import pytest
import small
import torch
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


def test_a_network_of_half_precision_has_a_digest() -> None:
    assert len(given.digest(nn.Linear(2, 2).to(torch.bfloat16))) == 24


def test_what_cannot_be_copied_is_one_sentence() -> None:
    network = nn.Linear(2, 2)
    network.kept = network(torch.ones(1, 2))  # of a graph: torch refuses to copy it
    with pytest.raises(UserError, match=r"model, a Linear, cannot be copied .* my_module:build"):
        given.copied(network)
    with pytest.raises(UserError, match=r"model is a dict, not a torch\.nn\.Module"):
        given.copied({})  # type: ignore[arg-type]
