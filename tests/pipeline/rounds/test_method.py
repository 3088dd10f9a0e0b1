"""What a round counts and guards, on four weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.base.errors import Agreed
from pipeline.rounds import method
from pipeline.rounds.subject import Subject
from pipeline.run.records import LayerCount, RoundPlan, TensorPlan
from pipeline.train.session import Session

NAME = "fc2.weight"


@pytest.fixture
def subject(small_session: Session) -> Subject:
    """The network of a tiny run, of which one tensor, of 10 x 20 weights, can be pruned."""
    model = small_session.new_model()
    [tensor] = [each for each in method.survey(model)[0] if each.name == NAME]
    dense = {NAME: dict(model.named_parameters())[NAME].detach().clone()}
    return Subject(small_session, model, [tensor], dense, None, None, None, total=tensor.weights)


def plan_of(keep: int) -> RoundPlan:
    tensor = TensorPlan(name=NAME, weights=200, keep=keep, dead=0, threshold=0.1)
    return RoundPlan(round=3, attempt=1, planned_density=keep / 200, budget=keep, predicted=None, tensors=(tensor,))


def test_counts_come_from_the_masks() -> None:
    kept = {"a": torch.tensor([True, False, True, True]), "b": torch.tensor([[False], [True]])}
    assert method.layer_counts(kept) == (LayerCount("a", 4, 3, 0.75), LayerCount("b", 2, 1, 0.5))


def test_the_masks_of_a_plan_keep_exactly_its_count_of_the_largest(subject: Subject) -> None:
    kept = method.shared_masks(subject, plan_of(7), subject.everything, {})[NAME]
    size = subject.weights[NAME].abs()
    assert int(kept.sum()) == 7
    assert size[kept].min() >= size[~kept].max()


def test_the_guard_names_what_is_wrong(subject: Subject) -> None:
    kept = method.shared_masks(subject, plan_of(7), subject.everything, {})
    method.apply_masks(subject.model, kept)
    method.guard(subject, kept, plan_of(7))
    with pytest.raises(Agreed, match=r"round 3: .*fc2.weight.*7"):
        method.guard(subject, kept, plan_of(8))
    with torch.no_grad():
        dict(subject.model.named_parameters())[NAME][~kept[NAME]] = 0.5
    with pytest.raises(Agreed, match=r"round 3: .*fc2.weight"):
        method.guard(subject, kept, replace(plan_of(7)))


def test_what_is_said_of_a_network_that_was_given(small_session: Session) -> None:
    """val is cut from train, and holds about as many of each of ten digits."""
    assert method.about_dense(small_session, 0.9, {}) == []
    assert "no better than guessing: it is right on 10.0% of val" in method.about_dense(small_session, 0.1, {})[0]
    config = small_session.config
    model = config.model.model_copy(update={"trained": True})
    dense = config.dense.model_copy(update={"epochs": 0})
    given = replace(small_session, config=config.model_copy(update={"model": model, "dense": dense}))
    first, second = method.about_dense(given, 0.9, {})
    assert first == "the dense network as it was given: val 90.00%"
    assert second.startswith("val is cut from train, and the network that was given may have been trained on it")
