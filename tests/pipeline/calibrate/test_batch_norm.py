"""Batch norm's statistics estimated again: the average over the batches, by hand, and put back to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.calibrate import batch_norm
from pipeline.data.loader import Batch
from pipeline.rounds import preflight
from pipeline.scan.inputs import scan_inputs
from pipeline.scan.levels import scan_part
from pipeline.settings.config import Config
from pipeline.task.feed import Feed
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import Session

CPU = torch.device("cpu")


def batch(*pixels: int, bad: int = 0) -> Batch:
    """One-pixel images; the last `bad` of them could not be read."""
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1)
    weights = torch.ones(len(pixels))
    weights[len(pixels) - bad :] = 0
    return Batch(images, torch.zeros(len(pixels), dtype=torch.int64), weights, torch.arange(len(pixels)))


@pytest.fixture
def config(tiny: Callable[..., Config]) -> Config:
    return tiny(**{"data.mean": [0.0], "data.std": [1.0]})


def test_statistics_are_the_average_over_the_batches(config: Config) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(1, momentum=0.3)).train()
    norm = model[2]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.running_mean += 100
    # Pixels are read as 0..1: means 0.5 and 1, variances 0.5 (of two, unbiased) and 0; the batch of one is left out.
    batch_norm.recalibrate(model, [batch(0, 255, 9, bad=1), batch(255, 255, 255), batch(0)], Feed.of(config), CPU)
    assert float(norm.running_mean) == pytest.approx(0.75)
    assert float(norm.running_var) == pytest.approx(0.25)
    assert norm.momentum == 0.3
    assert all(part.training for part in model.modules())


def test_statistics_come_back_to_the_bit(config: Config) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1)).eval()
    model[1].running_mean.fill_(0.123)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = batch_norm.statistics(model)
    batch_norm.recalibrate(model, [batch(0, 255)], Feed.of(config), CPU)
    assert float(model[1].running_mean) == pytest.approx(0.5)
    batch_norm.put_back(model, saved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_each_level_of_a_scan_has_its_own_statistics(small_session: Session) -> None:
    """Only the calibrated scan sees the outputs that a pruned convolution really has."""
    levels = {"levels": (0.5, 0.1), "samples": 100}
    calibrated = small_session.config.scan.model_copy(update={"bn_samples": 250, **levels})
    session = replace(small_session, config=small_session.config.model_copy(update={"scan": calibrated}))
    checkpoint.save(session.run, "dense/checkpoint", Checkpoint(dict(session.new_model().state_dict())))
    given = scan_inputs(session, "dense/checkpoint")
    model, calibration, dense = given.model, given.calibration, given.answers()
    assert sum(len(part.images) for part in calibration) == 250
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def losses(batches: Sequence[Batch]) -> list[float]:
        levels = scan_part(replace(given, calibration=batches), dense, "conv1.weight")
        return [level.loss for level in levels]

    def whole_forward(density: float) -> float:
        weight = dict(model.named_parameters())["conv1.weight"]
        kept, statistics = weight.detach().clone(), batch_norm.statistics(model)
        smallest = kept.abs().flatten().sort(descending=True).values[round(density * kept.numel()) - 1]
        weight.data.copy_(kept * (kept.abs() >= smallest))
        batch_norm.recalibrate(model, calibration, session.feed, CPU)
        loss = given.answers().figures().loss
        weight.data.copy_(kept)
        batch_norm.put_back(model, statistics)
        return loss

    assert losses(calibration) == [whole_forward(0.5), whole_forward(0.1)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert losses(calibration)[0] != losses([])[0]


def test_a_network_without_batch_norm_is_told_that_the_setting_does_nothing(small_session: Session) -> None:
    config = small_session.config
    plain = config.model.model_copy(update={"kwargs": {"norm": False}})
    asked = config.prune.model_copy(update={"bn_samples": 64})
    with pytest.warns(UserWarning, match=r"prune\.bn_samples=64 is ignored: the network has no batch norm"):
        preflight.check(config.model_copy(update={"model": plain, "prune": asked}), small_session.run)
