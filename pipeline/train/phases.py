"""Phases of a retraining: some layers are updated while the others are held fixed.

Han et al. 2015, section 3.3: convolutions are held fixed while fully connected layers are retrained, and the other way
round, since gradients through many sparse layers vanish.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pipeline.base.errors import UserError
from pipeline.network.layers import ATTENTION, CONVOLUTIONS, LAYERS


def at(step: int, total: int, count: int) -> int:
    """The phase, of `count`, of update `step` (from 0) of `total`: equal shares, and the last takes the remainder."""
    return min(step // max(1, total // count), count - 1)


def first_step(phase: int, total: int, count: int) -> int:
    """The first update of a phase."""
    return phase * max(1, total // count)


def kinds(model: nn.Module) -> dict[str, str]:
    """Each parameter's kind, "fc" or "conv", by name.

    Weights and biases of linear layers and of attention are fc, those of convolutions conv; any other parameter (a
    norm's, an embedding's) goes with the layer that is defined before it, or else with the first one.
    """
    found: dict[str, str] = {}
    layers = [part for part in model.modules() if isinstance(part, LAYERS + ATTENTION)]
    kind = _kind(layers[0]) if layers else "fc"
    for path, part in model.named_modules():
        kind = _kind(part) if isinstance(part, LAYERS + ATTENTION) else kind
        for name, _ in part.named_parameters(prefix=path, recurse=False):
            found[name] = kind
    return {name: found[name] for name, _ in model.named_parameters()}


def require_layers(model: nn.Module, phases: Sequence[str]) -> None:
    """Raise UserError for a phase in which there would be nothing to update."""
    there = set(kinds(model).values())
    for phase in phases:
        if phase != "all" and phase not in there:
            layers = "fully connected layer" if phase == "fc" else "convolution"
            raise UserError(f"retrain.phases={[*phases]}: the network has no {layers}; leave '{phase}' out")


def hold(model: nn.Module, phase: str, trainable: Sequence[str]) -> None:
    """Let gradients reach only the `trainable` parameters that belong to the phase, and drop all gradients so far.

    An optimizer leaves a parameter without a gradient as it is, to the bit: no weight decay, no momentum.
    """
    kind = kinds(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable and phase in ("all", kind[name]))
        parameter.grad = None


def _kind(layer: nn.Module) -> str:
    return "conv" if isinstance(layer, CONVOLUTIONS) else "fc"
