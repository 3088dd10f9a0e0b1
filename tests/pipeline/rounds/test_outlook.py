"""`plan`: sizes worked by hand, nothing run, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.base.errors import UserError
from pipeline.cli import commands
from pipeline.network import cost
from pipeline.rounds import outlook, preflight
from pipeline.settings.config import Config


def test_a_plan_counts_weights_steps_and_samples(tiny: Callable[..., Config], tmp_path: Path) -> None:
    made = outlook.make(tiny(**{"prune.allocation": "uniform", "target.compression": 4}))
    assert (made.counts.train, made.counts.val, made.counts.test) == (1293, 144, 360)
    assert [tensor.weights for tensor in made.prunable] == [19200, 30000, 1000]
    assert {tensor.name for tensor in made.left_out} == {"fc1.bias", "fc2.bias", "fc3.bias"}
    assert made.flops == {"fc1.weight": 38400, "fc2.weight": 60000, "fc3.weight": 2000}
    assert [row.kept for row in made.rounds] == [25100, 12550]  # geometric: 1/2, then 1/4 of 50,200
    assert made.densities == pytest.approx({"fc1.weight": 0.25, "fc2.weight": 0.25, "fc3.weight": 0.25}, abs=1e-3)
    # 1,293 samples in 8 lanes of 161; 8 a lane and step: 20 steps an epoch.
    assert made.dense_steps == 3 * 20
    assert [row.steps for row in made.rounds] == [40, 40]
    assert not (tmp_path / "runs").exists()


def test_densities_that_follow_from_training_are_said_to(tiny: Callable[..., Config]) -> None:
    made = outlook.make(tiny())
    assert made.densities == {}
    assert any("scan" in note for note in made.notes)
    assert made.rounds[-1].kept == 50200 // 6


def test_densities_that_follow_from_statistics_are_said_to(tiny: Callable[..., Config]) -> None:
    taken = {"prune.criterion": "obs", "dense.epochs": 0, "model.trained": True}
    made = outlook.make(tiny(**taken, **{"prune.allocation": "pooled"}))
    assert made.densities == {}
    assert any("follow from trained weights, statistics of train samples;" in note for note in made.notes)
    assert outlook.make(tiny(**taken, **{"prune.allocation": "erk"})).densities  # scores do not matter to these


def test_imagenet_is_planned_without_its_files_and_not_run_without_them() -> None:
    path = Path(__file__).parents[3] / "configs/vgg16-paper.yaml"
    made = outlook.make(commands.load(path, [], needs_data=False))
    assert made.counts == preflight.Counts(train=1_255_544, val=25_623, test=50_000, classes=1000)
    assert sum(tensor.weights for tensor in made.prunable) == 138_344_128
    assert made.flops["conv1_2.weight"] == 2 * 36_864 * 224 * 224
    assert made.dense_steps == 74 * (1_255_544 // 32 // 8)  # 8 samples of each of 32 lanes a step
    with pytest.raises(UserError, match=r"vgg16-paper\.yaml.*data\.root.*not set"):
        commands.load(path, [])


@pytest.mark.parametrize(
    ("weights", "kept", "expected"),
    [
        (1000, 1000, 4000),  # dense: no index
        (1000, 0, 0),
        (1000, 900, 3600 + 125),  # a bitmask: one bit a weight
    ],
)
def test_predicted_bytes(weights: int, kept: int, expected: int) -> None:
    assert cost.packed_bytes(weights, kept) == expected


def test_predicted_bytes_of_a_sparse_tensor_are_near_the_entropy() -> None:
    """At 5% density an i.i.d. mask holds 5.73 bits a kept weight; Rice's code comes within 2%."""
    index_bits = (cost.packed_bytes(10**6, 50_000) - 4 * 50_000) * 8 / 50_000
    assert 5.73 <= index_bits <= 5.73 * 1.02


def test_a_network_that_does_not_take_the_images_is_one_message(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"cannot take images of shape \(1, 8, 8\)"):
        outlook.make(tiny(**{"model.kwargs": {"inputs": 63}}))


def test_a_network_with_too_few_outputs_is_one_message(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match="10 classes"):
        outlook.make(tiny(**{"model.kwargs": {"inputs": 64, "classes": 9}}))
