"""Learning rates and regularisers, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.settings.training import Retrain, Train
from pipeline.train import recipe
from pipeline.train.checkpoint import plain_tensors


def train(**settings: Any) -> Train:
    return Train.model_validate({"epochs": 2, "lr": 1.0, **settings})


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({"schedule": "constant"}, 19, 1.0),
        ({"schedule": "cosine"}, 0, 1.0),
        ({"schedule": "cosine"}, 10, 0.5),
        ({"schedule": "step", "milestones": (0.5, 0.75)}, 9, 1.0),
        ({"schedule": "step", "milestones": (0.5, 0.75)}, 10, 0.1),
        ({"schedule": "step", "milestones": (0.5, 0.75)}, 15, 0.01),
        ({"schedule": "inv", "gamma": 0.5, "power": 2.0}, 2, 0.25),
        ({"schedule": "constant", "warmup_epochs": 0.3}, 0, 0.25),
        ({"schedule": "constant", "warmup_epochs": 0.3}, 3, 1.0),
    ],
)
def test_learning_rate(settings: dict[str, Any], step: int, expected: float) -> None:
    assert recipe.learning_rate(train(**settings), step, steps_per_epoch=10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "expected"), [({"lr": 0.3}, 0.3), ({"lr_scale": 0.01}, 0.005), ({}, 0.01), ({"epochs": 5}, 0.01)]
)
def test_the_learning_rate_of_retraining(settings: dict[str, Any], expected: float) -> None:
    retrain = Retrain.model_validate({"schedule": "constant", **settings})
    resolved = recipe.resolve(retrain, train(lr=0.5))
    assert recipe.learning_rate(resolved, 0, 10) == pytest.approx(expected)
    assert retrain == Retrain.model_validate({"schedule": "constant", **settings})
    assert recipe.resolve(train(lr=0.5), train(lr=0.5)).lr == 0.5


def test_steps_end_a_training_early() -> None:
    assert recipe.total_steps(train(), 10) == 20
    assert recipe.total_steps(train(steps=7), 10) == 7


def test_l1_adds_the_sign_of_each_weight() -> None:
    weight = torch.nn.Parameter(torch.tensor([2.0, -3.0, 0.0]))
    weight.grad = torch.tensor([1.0, 1.0, 1.0])
    recipe.add_l1([weight], 0.5)
    assert weight.grad.tolist() == [1.5, 0.5, 1.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_optimizer_put_back_makes_the_same_next_step(name: str, layout: torch.memory_format) -> None:
    def fresh() -> tuple[torch.nn.Conv2d, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Conv2d(2, 3, 3).to(memory_format=layout)
        return model, recipe.make_optimizer(train(optimizer=name, lr=0.1, momentum=0.9), list(model.parameters()))

    def step(model: torch.nn.Conv2d, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.arange(18.0).view(1, 2, 3, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = fresh()
    step(model, optimizer)
    other, second = fresh()
    other.load_state_dict(model.state_dict())
    names = [key for key, _ in model.named_parameters()]
    saved = plain_tensors(recipe.optimizer_tensors(optimizer, names))  # as a checkpoint holds them: in one layout
    recipe.load_optimizer_tensors(second, names, saved)
    step(model, optimizer)
    step(other, second)
    assert torch.equal(model.weight, other.weight)
