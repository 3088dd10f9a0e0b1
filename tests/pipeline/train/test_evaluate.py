"""Exact evaluation of a network whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.data.loader import EvalLoader
from pipeline.train.evaluate import evaluate
from pipeline.train.session import Session


class Always(nn.Module):
    """Logit 2 for one class, 0 for the nine others."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 10)
        logits[:, self.answer] = 2.0
        return logits


def test_every_sample_counts_once(small_session: Session) -> None:
    split = small_session.split("val")
    config = small_session.config.data.model_copy(update={"eval_batch": 7})  # the last batch is a smaller one
    answers = evaluate(Always(3), EvalLoader(split, config), small_session.feed, small_session.world, 10)
    share = float((split.labels == 3).mean())
    found = answers.metrics()
    assert len(answers.right) == len(split)
    assert found.top1 == pytest.approx(share)
    # The partition function is e^2 + 9; a right answer's loss is 2 less than a wrong one's.
    assert found.loss == pytest.approx(math.log(math.e**2 + 9) - 2 * share)
    assert found.top1_present is None


def test_the_networks_mode_is_put_back(small_session: Session) -> None:
    model = Always(0).train()
    small_session.evaluate(model, "val")
    assert model.training
