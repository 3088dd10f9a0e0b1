"""Networks, built in or by import path, and their weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pipeline.base import blame
from pipeline.base.errors import UserError
from pipeline.base.seeding import derive
from pipeline.network import factory as factories
from pipeline.network.logits import of_logits
from pipeline.network.weights import load_weights
from pipeline.settings.model import Model

# What other people's networks raise when they are given arguments or images that do not fit.
FOREIGN = (
    TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, AssertionError, MemoryError
)  # fmt: skip


def build_network(model: Model, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The network of the config, on the CPU, initialised from `seed` or from model.checkpoint.

    `num_classes` is passed to a factory that takes an argument `num_classes` or `classes`, or any keyword (as
    torchvision's do), unless model.kwargs sets one of the two. Raises UserError for a factory that cannot be imported,
    does not take its arguments, or makes no nn.Module, and for a checkpoint that does not fit.

    A network that gives several outputs, as torchvision's with auxiliary heads do in training, gives its first one, and
    one that gives Hugging Face's outputs its `logits`.
    """
    factory = factories.find(model.factory)
    kwargs = {**_class_argument(factory, model.kwargs, num_classes), **model.kwargs}
    # devices=[]: only the CPU's generator is touched, and it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init"))
        try:
            network = factory(**kwargs)
        except UserError:
            raise  # of ours: a network given as an object that this process does not hold
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            missing = error.name if isinstance(error, ImportError) else None
            raise UserError(
                f"model.factory='{model.factory}' does not work with the arguments {str(kwargs)[:300]} (model.kwargs "
                f"and the number of classes): {blame.text(error)}{blame.clash(missing)}"
            ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model.factory='{model.factory}' made a {type(network).__name__}, not a torch.nn.Module; name a function "
            "or class that returns the network"
        )
    if model.checkpoint is not None:
        load_weights(network, model.checkpoint, model.checkpoint_key)
    return of_logits(network)


def _class_argument(factory: Callable[..., Any], given: Mapping[str, Any], classes: int | None) -> dict[str, int]:
    """The keyword by which the factory takes the number of classes, or nothing."""
    if classes is None or "classes" in given or "num_classes" in given:
        return {}
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a factory written in C has no signature to read
        return {}
    for name in ("num_classes", "classes"):
        if name in parameters:
            return {name: classes}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"num_classes": classes} if takes_any else {}
