"""All tensors pruned together: which allocations are tried, what is measured of them, and that all is put back."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pipeline.prune.damage import POWERS
from pipeline.prune.masks import top_mask
from pipeline.scan import together
from pipeline.scan.levels import answers_of
from tests.pipeline.scan.test_levels import CPU, config, problem

LEVELS = [
    {"density": density, "rise": rise, "rise_low": rise, "rise_high": rise}
    for density, rise in ((0.5, 0.01), (0.1, 0.2), (0.02, 1.0))
]
SCAN = {
    "dense": {"loss": 0.1},
    "tensors": [
        {"name": "a", "weights": 1000, "levels": LEVELS},
        {"name": "b", "weights": 50, "levels": [level | {"rise": 3 * level["rise"]} for level in LEVELS]},
    ],
}


def test_each_power_has_an_allocation_of_its_own_that_spends_the_budget() -> None:
    found = together.allocations(SCAN, 10, [0.5, 0.1, 0.001])
    assert [*found] == [0.5, 0.1]  # one weight is too few for two tensors
    for density, by_power in found.items():
        assert [*by_power] == [*POWERS]
        assert {sum(keep.values()) for keep in by_power.values()} == {round(density * 1050)}
        assert all(min(keep.values()) >= 1 for keep in by_power.values())
    assert len({keep["b"] for keep in found[0.1].values()}) > 1


def test_the_pruned_network_is_measured_against_the_dense_one_and_put_back() -> None:
    model, batches = problem()
    norm = nn.BatchNorm1d(5).eval()
    model.append(norm)
    before = copy.deepcopy(model.state_dict())
    dense = answers_of(model, batches, config(), CPU)
    names = ["0.weight", "3.weight"]
    sizes = {name: dict(model.named_parameters())[name].numel() for name in names}
    fewer = {"0.weight": 20, "3.weight": 900}
    whole, pruned = together.measure(model, [sizes, fewer], batches, dense, config(), CPU)
    assert (whole["drop"], whole["rise"], whole["samples"]) == (0, 0, dense.valid.sum())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    for name, keep in fewer.items():
        weight = dict(model.named_parameters())[name].data
        weight.mul_(top_mask(weight.abs(), torch.ones_like(weight, dtype=torch.bool), keep))
    by_hand = answers_of(model, batches, config(), CPU).figures()
    assert (pruned["loss"], pruned["top1"]) == (by_hand["loss"], by_hand["top1"])
    assert pruned["rise"] > 0.01


def test_batch_norm_is_calibrated_for_each_allocation_and_put_back() -> None:
    model, batches = problem()
    model.insert(1, nn.BatchNorm2d(6).eval())
    dense = answers_of(model, batches, config(), CPU)
    before = copy.deepcopy(model.state_dict())
    keep = {"0.weight": 10, "4.weight": 1000}
    given = config(bn_samples=80)
    (left,) = together.measure(model, [keep], batches, dense, given, CPU)
    (calibrated,) = together.measure(model, [keep], batches, dense, given, CPU, batches[:2])
    assert left["loss"] != calibrated["loss"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
