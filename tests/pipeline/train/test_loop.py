"""One update of the training loop, against the same update written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base.errors import Agreed
from pipeline.train.loop import Training
from pipeline.train.session import Session

NAME = "fc2.weight"


def training(session: Session, masks: dict[str, Tensor] | None = None, **settings: Any) -> Training:
    plain = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.25, "schedule": "constant", "precision": "fp32"}
    recipe = session.config.dense.model_copy(update={**plain, **settings})
    return Training(session, session.new_model().eval(), recipe, "dense", "dense", [NAME], masks)


def gradient(made: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Of the mean cross-entropy, for the weight."""
    weight = made.parameters[NAME]
    logits = made.model(made.session.feed.inputs(images))
    return torch.autograd.grad(F.cross_entropy(logits, labels), weight)[0]


def test_two_updates_are_sgd_with_momentum_and_decay(small_session: Session) -> None:
    made = training(small_session)
    weight = made.parameters[NAME]
    expected, moved = weight.detach().clone(), torch.zeros_like(weight)
    for step, batch in zip(range(2), made.loader.epoch(0), strict=False):
        moved = 0.5 * moved + gradient(made, batch.images, batch.labels) + 0.25 * expected
        expected = expected - 0.1 * moved
        made.position.step = step
        made._update(made.model, batch)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parts", [2, 3, 64, 1000])
def test_an_update_in_parts_is_the_same(parts: int, small_session: Session) -> None:
    whole, split = training(small_session), training(small_session, accumulate=parts)
    batch = next(iter(whole.loader.epoch(0)))
    for made in (whole, split):
        made._update(made.model, batch)
    torch.testing.assert_close(split.parameters[NAME], whole.parameters[NAME], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(split.tally.here, whole.tally.here)


def test_dropout_draws_what_torchs_own_seed_gives(small_session: Session) -> None:
    torch.manual_seed(2**62 + 5)
    expected = torch.rand(8)
    small_session.world.seed(2**62 + 5)
    assert torch.equal(torch.rand(8), expected)


def test_a_pruned_weight_stays_zero(small_session: Session) -> None:
    mask = torch.arange(200).view(10, 20) % 2 == 0
    made = training(small_session, {NAME: mask})
    made.applier.apply()
    made._update(made.model, next(iter(made.loader.epoch(0))))
    weight = made.parameters[NAME].detach()
    assert torch.equal(weight != 0, mask)


def test_an_unreadable_image_adds_nothing(small_session: Session) -> None:
    made = training(small_session)
    batch = next(iter(made.loader.epoch(0)))
    valid = torch.ones_like(batch.weights)
    valid[3] = 0
    expected = training(small_session)
    before = expected.parameters[NAME].detach().clone()
    kept = valid > 0
    share = int(kept.sum()) / len(valid)  # the divisor stays the size of the whole batch
    step = share * gradient(expected, batch.images[kept], batch.labels[kept]) + 0.25 * before
    made._update(made.model, replace(batch, weights=valid))
    torch.testing.assert_close(made.parameters[NAME].detach(), before - 0.1 * step, rtol=1e-5, atol=1e-7)


def test_an_update_that_is_not_finite_is_not_made(small_session: Session) -> None:
    made = training(small_session)
    with torch.no_grad():
        made.parameters["fc1.bias"][0] = math.nan
    before = made.parameters[NAME].detach().clone()
    with pytest.raises(Agreed, match=r"dense: the gradient of step 0 is not finite"):
        made._update(made.model, next(iter(made.loader.epoch(0))))
    assert torch.equal(made.parameters[NAME].detach(), before)
