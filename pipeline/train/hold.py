"""Masks held in a training loop of the user's own: pruned weights are 0 again after each step of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.base.errors import UserError
from pipeline.base.names import few
from pipeline.prune.masks import Applier
from pipeline.train import recipe


class Held:
    """Masks that are held until `release`; as a context manager, until the end of the block."""

    def __init__(
        self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.masks = dict(masks)
        self._weights = dict(weights)
        self._applier: Applier | None = None
        self._made_for: list[Any] = []
        self.apply()
        assert self._applier is not None
        slots = recipe.momentum_buffers(optimizer, [*self._weights.values()])
        for number in range(max((len(tensors) for tensors in slots), default=0)):
            self._applier.zero([tensors[number] if number < len(tensors) else None for tensors in slots])
        self._hook: RemovableHandle = optimizer.register_step_post_hook(self._stepped)

    def apply(self) -> None:
        """Set the pruned weights to 0 now. After each step this is done by itself."""
        weights = [*self._weights.values()]
        made_for = [(weight.device, weight.dtype) for weight in weights]
        if self._applier is None or made_for != self._made_for:  # the network moved to a GPU since
            masks = [self.masks[name].to(weight.device) for name, weight in self._weights.items()]
            self._applier = Applier([*weights], masks)
            self._made_for = made_for
        self._applier.apply()

    def _stepped(self, *_: object) -> None:
        self.apply()

    def release(self) -> None:
        """Let go of the weights: later steps change them all."""
        self._hook.remove()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold(model: nn.Module, masks: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Held:
    """Hold `masks` on `model` while `optimizer` trains it: pruned weights are 0 now, and after each of its steps.

    `masks` are bool tensors by the names of parameters, each of its parameter's shape; True keeps. What the optimizer
    remembers of pruned weights (momentum, second moments) is set to 0 once; weights are set to 0 after each step, so
    momentum, weight decay and decoupled weight decay cannot bring them back. A step that a gradient scaler leaves out
    changes nothing. Names may lack what DataParallel or torch.compile put into them.

    Raises UserError for a mask of no parameter, of another shape or type, and where the optimizer holds none of the
    masked parameters. Source: the masked retraining of Han et al. 2015, section 3.1.
    """
    weights, named = matched(model, masks)
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning and Accelerate wrap it
    if not hasattr(inner, "param_groups"):
        raise UserError(
            f"optimizer is a {type(optimizer).__name__}: give the torch.optim.Optimizer that trains this model"
        )
    updated = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not any(id(weight) in updated for weight in weights.values()):
        raise UserError("the optimizer holds none of the masked parameters: give the optimizer that trains this model")
    return Held(weights, named, inner)


def matched(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The masked parameters of a model, and their masks, by name. Raises UserError for masks that do not fit it."""
    if not isinstance(masks, Mapping):
        raise UserError(
            f"masks is a {type(masks).__name__}: give masks by the names of parameters, as masks_of(RUN) does"
        )
    parameters = {_plain(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    named = {_plain(name): mask for name, mask in masks.items()}
    if not named:
        raise UserError("masks is empty: there is nothing to hold; give masks by the names of parameters")
    unknown = [name for name in named if name not in parameters]
    if unknown:
        raise UserError(
            f"masks has {few(unknown)}, and the model has no parameter of that name: give the model that was pruned, "
            "not one around it or one that was made compact"
        )
    for name, mask in named.items():
        shape = tuple(parameters[name].shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise UserError(
                f"the mask of {name} is {tuple(mask.shape)} of {mask.dtype}: give a bool tensor of its parameter's "
                f"shape, {shape}"
            )
    return {name: parameters[name] for name in named}, named


def _plain(name: str) -> str:
    """The name of a parameter without what DataParallel and torch.compile put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
