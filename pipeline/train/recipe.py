"""The recipe of a training as plain functions: learning rates, optimizers, regularisers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.base.errors import Agreed
from pipeline.settings.training import Retrain, Train

DEFAULT_RETRAIN_LR = 0.01


def resolve(recipe: Train, dense: Train) -> Train:
    """The recipe with its learning rate worked out: retraining's may be a factor of the dense one's."""
    if not isinstance(recipe, Retrain) or recipe.lr is not None:
        return recipe
    rate = DEFAULT_RETRAIN_LR if recipe.lr_scale is None else recipe.lr_scale * dense.lr
    return recipe.model_copy(update={"lr": rate})


def total_steps(recipe: Train, steps_per_epoch: int) -> int:
    """Updates in the whole training."""
    planned = recipe.epochs * steps_per_epoch
    return min(planned, recipe.steps) if recipe.steps else planned


def learning_rate(recipe: Train, step: int, steps_per_epoch: int) -> float:
    """The learning rate of update `step` (from 0). `inv` is Caffe's policy for LeNet."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    total = total_steps(recipe, steps_per_epoch)
    share = (step - warmup) / max(1.0, total - warmup)
    match recipe.schedule:
        case "constant":
            return recipe.lr
        case "cosine":
            return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
        case "step":
            return recipe.lr * recipe.gamma ** sum(share >= milestone for milestone in recipe.milestones)
        case "inv":
            return recipe.lr * (1.0 + recipe.gamma * step) ** -recipe.power


def finite_rate(recipe: Train, step: int, steps_per_epoch: int, phase: str) -> float:
    """The same. Raises Agreed if it is too large for floating point."""
    try:
        rate = learning_rate(recipe, step, steps_per_epoch)
    except OverflowError:
        rate = math.inf
    if not math.isfinite(rate):
        raise Agreed(
            f"{phase}: the learning rate of step {step} is not finite: lower gamma or power "
            f"(schedule={recipe.schedule})"
        )
    return rate


def make_optimizer(recipe: Train, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters, in one fused call a step."""
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=recipe.lr, betas=(recipe.momentum, 0.999), weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def add_l1(weights: Sequence[nn.Parameter], strength: float) -> None:
    """Add the gradient of strength * sum |w| to the gradients of `weights`."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    signs = torch._foreach_sign([weight.detach() for weight in weights if weight.grad is not None])
    torch._foreach_add_(gradients, list(signs), alpha=strength)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `fc1.weight/momentum_buffer`. They are its own: copy what is to last."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.detach()
        for index, slots in state.items()
        for key, value in slots.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: dict[str, Tensor]) -> None:
    """Load the tensors that `optimizer_tensors` returned.

    Each is laid out in memory as its parameter is (channels last, say): fused optimizers go through both in one order.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(names.index(parameter), {})[key] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
    for weight, slots in optimizer.state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                slots[slot] = torch.empty_like(weight).copy_(value)


def momentum_buffers(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter]) -> list[list[Tensor]]:
    """For each weight, the optimizer's tensors of the weight's own shape (momentum, second moments)."""
    return [
        [
            value
            for value in optimizer.state.get(weight, {}).values()  # never [weight]: it would add an empty entry
            if isinstance(value, Tensor) and value.shape == weight.shape
        ]
        for weight in weights
    ]
