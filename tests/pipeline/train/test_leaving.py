"""A training whose machine is about to be taken away saves the step it is at, and goes on from it to the same bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from pipeline.base.errors import Leaving
from pipeline.train import checkpoint, loop
from pipeline.train.loop import LOOK_EVERY, Training
from pipeline.train.session import Session


def trained(session: Session, phase: str) -> nn.Module:
    settings = session.config.dense.model_copy(update={"epochs": 2, "checkpoint_steps": 1000})
    model = session.new_model()
    Training(session, model, settings, phase, "leaving", []).fit()
    return model


def test_a_training_that_is_told_to_leave_goes_on_where_it_was(
    small_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY_S", 0.0)
    undisturbed = trained(small_session, "stays")
    answers = iter([False, True])
    told = dataclasses.replace(small_session, leaving=lambda: next(answers))
    with pytest.raises(Leaving, match=f"leaves: step {2 * LOOK_EVERY} of"):
        trained(told, "leaves")
    saved = checkpoint.latest(small_session.run, "leaves")
    assert saved is not None
    assert saved.state["step"] == 2 * LOOK_EVERY
    model = trained(small_session, "leaves")
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_question_whether_to_leave_is_asked_seconds_apart(
    small_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for all ranks, so at every tenth step it would slow quick ones down."""
    monkeypatch.setattr(loop, "LOOK_EVERY_S", 3600.0)
    asked: list[None] = []
    trained(dataclasses.replace(small_session, leaving=lambda: bool(asked.append(None))), "asked")
    assert len(asked) == 1
