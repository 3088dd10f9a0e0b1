"""The inputs that a linear or convolution layer multiplies by its weights, as rows, one for each output position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.base.seeding import derive

POSITIONS = 256  # the most output positions of a convolution that are taken from each sample
LARGEST_BYTES = 2**30  # the largest X Xᵀ: products of one layer's inputs with each other, float64

# Layers of these types, or of types with one of their forward methods, multiply their inputs by the weight as it is.
_OF_ATTENTION = nn.modules.linear.NonDynamicallyQuantizableLinear  # it holds a weight, and is never called
_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer's output is its weight times `rows`, plus its bias: a subclass may compute something else."""
    return type(layer).forward in _FORWARDS and not isinstance(layer, _OF_ATTENTION)


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called with, by place or by keyword."""
    inputs: Tensor = args[0] if args else kwargs["input"]
    return inputs


def matrix(layer: Any, weight: Tensor) -> Tensor:
    """A tensor shaped like the layer's weight as (groups, outputs of a group, inputs of an output); a view."""
    groups = getattr(layer, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def gram_bytes(layer: Any) -> int:
    """Bytes of the products of a layer's inputs with each other in float64; the bias counts as an input."""
    groups, _, inputs = matrix(layer, layer.weight).shape
    return 8 * groups * (inputs + 1) ** 2


def rows(layer: Any, inputs: Tensor, seed: int) -> Tensor:
    """The inputs that each output of the layer sums over: (groups, rows, inputs of an output), columns as in `matrix`.

    For a linear layer a row is a sample (or a token, if samples have several). For a convolution a row is an output
    position of a sample: all positions are taken, or POSITIONS drawn by `seed`, the same ones in every sample.
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(1, -1, layer.in_features)
    axes = len(layer.kernel_size)
    # This is the layer's own padding: torch keeps the amounts in the order of F.pad, also for padding="same".
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    for axis in range(axes):
        size, stride, apart = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        windows = windows.unfold(2 + axis, apart * (size - 1) + 1, stride)[..., ::apart]
    sizes = windows.shape[2 : 2 + axes]  # (samples, channels, *positions, *kernel), a view without copies
    chosen = _positions(sizes.numel(), seed).to(inputs.device)
    where: tuple[Any, ...] = (slice(None), slice(None), *torch.unravel_index(chosen, sizes))
    taken = windows[where]
    samples, channels = inputs.shape[:2]
    grouped = taken.reshape(samples, layer.groups, channels // layer.groups, len(chosen), -1)
    by_group = grouped.permute(1, 0, 3, 2, 4)  # (groups, samples, positions, channels of a group, kernel)
    return by_group.reshape(layer.groups, samples * len(chosen), -1)


def _positions(count: int, seed: int) -> Tensor:
    """Which of `count` positions are taken, in ascending order."""
    if count <= POSITIONS:
        return torch.arange(count)
    source = torch.Generator().manual_seed(derive(seed, "positions", count))
    return torch.randperm(count, generator=source)[:POSITIONS].sort().values
