"""A training saves the step it is at when its machine is taken away, or time is up, and goes on to the same bits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from tiny_run import ALONE
from torch import Tensor, nn

from pipeline.base.errors import Leaving, UserError
from pipeline.train import checkpoint, looks
from pipeline.train.looks import LOOK_EVERY, Looks
from pipeline.train.loop import Position, Training
from pipeline.train.session import Session
from pipeline.train.tally import Tally
from pipeline.train.world import World


def training(session: Session, phase: str, minutes: float = 0.0) -> Training:
    settings = {"epochs": 2, "checkpoint_steps": 1000, "checkpoint_minutes": minutes}
    recipe = session.config.dense.model_copy(update=settings)
    return Training(session, session.new_model(), recipe, phase, "leaving", [])


def trained(session: Session, phase: str) -> nn.Module:
    made = training(session, phase)
    made.fit()
    return made.model


def test_a_training_that_is_told_to_leave_goes_on_where_it_was(
    small_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "LOOK_EVERY_S", 0.0)
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
    monkeypatch.setattr(looks, "LOOK_EVERY_S", 3600.0)
    asked: list[None] = []
    trained(dataclasses.replace(small_session, leaving=lambda: bool(asked.append(None))), "asked")
    assert len(asked) == 1


def what_it_came_to(made: Training, position: Position) -> tuple[list[Tensor], list[tuple[float, str]]]:
    """The weights, and the loss and the order of each epoch."""
    return [*made.model.state_dict().values()], [(epoch.loss, epoch.order) for epoch in position.history]


def test_a_training_that_is_shorter_than_checkpoint_steps_is_saved_by_time_and_goes_on_to_the_same_bits(
    small_session: Session, interrupt: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to the same sums over an epoch, whose last bits depend on where they are cut."""
    undisturbed = training(small_session, "whole")
    expected = what_it_came_to(undisturbed, undisturbed.fit())
    monkeypatch.setattr(looks, "LOOK_EVERY_S", 0.0)
    interrupt("timed", LOOK_EVERY + 3)
    with pytest.raises(KeyboardInterrupt):
        training(small_session, "timed", 1e-9).fit()
    saved = checkpoint.latest(small_session.run, "timed")
    assert saved is not None
    assert saved.state["step"] == LOOK_EVERY
    assert saved.state["totals"] == [0.0, 0.0, 0.0]
    monkeypatch.undo()
    again = training(small_session, "timed", 1e-9)
    weights, epochs = what_it_came_to(again, again.fit())
    assert all(torch.equal(one, two) for one, two in zip(weights, expected[0], strict=True))
    assert epochs == expected[1]


def test_a_checkpoint_is_late_by_the_clock_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made, never = Looks(ALONE, 1.0, 3), Looks(ALONE, 0.0, 3)
    assert [step for step in range(4, 30) if made.due(step)] == [10]
    now[0] = 159.0
    assert not made.late(10)
    assert made.next == 20  # 59 s for 7 steps: the next ten
    now[0] = 160.0
    assert made.late(20)
    assert made.next == 40  # 1 s for 10 steps: those of the next 2 s
    made.saved()
    now[0] = 219.0
    assert not made.late(40)
    assert not never.late(10)


def test_what_each_rank_has_summed_is_put_together_by_as_many_ranks_or_by_fewer() -> None:
    saved = {"totals": [1.0, 2.0, 0.0], "running": [[0.5, 3.0, 1.0], [0.25, 4.0, 0.0]], "order": -1}
    second = Tally(World(1, 2, torch.device("cpu")))
    second.load(saved)
    assert second.here.tolist() == [0.25, 4.0, 0.0]
    alone = Tally(ALONE)
    alone.load(saved)
    alone.collect()
    assert alone.totals == [1.75, 9.0, 1.0]
    assert alone.order_text == "f" * 16
    alone.load({"totals": [1.0, 2.0, 3.0], "order": 5})  # of a program that saved after it had collected
    assert alone.state() == {"totals": [1.0, 2.0, 3.0], "running": [[0.0, 0.0, 0.0]], "order": 5}


def test_a_checkpoint_of_other_data_is_refused(small_session: Session) -> None:
    made = training(small_session, "other data")
    made.position.step = 4
    made._save()
    manifest = small_session.manifest
    others = dataclasses.replace(small_session, manifest=dataclasses.replace(manifest, identity="elsewhere"))
    with pytest.raises(UserError, match=rf"the checkpoint of other data at step 4.* the data were {manifest.identity}"):
        training(others, "other data").fit()
