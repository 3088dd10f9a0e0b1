"""All tensors pruned together: which allocations are tried, what is measured of them, and that all is put back."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from scan_records import level, scan, scan_of, tensor
from torch import nn

from pipeline.prune.damage import POWERS
from pipeline.prune.masks import top_mask
from pipeline.run.records import DenseFigures, Level
from pipeline.scan import together
from tests.pipeline.scan.test_levels import CPU, config, problem


def levels(times: float) -> list[Level]:
    return [
        level(density, rise=times * rise, rise_low=rise, rise_high=rise)
        for density, rise in ((0.5, 0.01), (0.1, 0.2), (0.02, 1.0))
    ]


SCAN = scan([tensor("a", 1000, levels(1)), tensor("b", 50, levels(3))], dense=DenseFigures(0.9, 0.1))


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
    given = scan_of(config(), CPU, model, batches)
    dense = given.answers()
    names = ["0.weight", "3.weight"]
    sizes = {name: dict(model.named_parameters())[name].numel() for name in names}
    fewer = {"0.weight": 20, "3.weight": 900}
    whole, pruned = together.measure(given, dense, [sizes, fewer])
    assert (whole.drop, whole.rise, whole.samples) == (0, 0, dense.valid.sum())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    for name, keep in fewer.items():
        weight = dict(model.named_parameters())[name].data
        weight.mul_(top_mask(weight.abs(), torch.ones_like(weight, dtype=torch.bool), keep))
    by_hand = given.answers().figures()
    assert (pruned.loss, pruned.top1) == (by_hand.loss, by_hand.top1)
    assert pruned.rise > 0.01


def test_batch_norm_is_calibrated_for_each_allocation_and_put_back() -> None:
    model, batches = problem()
    model.insert(1, nn.BatchNorm2d(6).eval())
    given = scan_of(config(bn_samples=80), CPU, model, batches)
    dense = given.answers()
    before = copy.deepcopy(model.state_dict())
    keep = {"0.weight": 10, "4.weight": 1000}
    (left,) = together.measure(given, dense, [keep])
    (calibrated,) = together.measure(replace(given, calibration=batches[:2]), dense, [keep])
    assert left.loss != calibrated.loss
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
