"""What a network's layers cost: floating point operations, and predicted packed bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.network.layers import layers_by_tensor
from pipeline.network.modes import evaluating

Quantity = Literal["weights", "flops", "bytes"]  # what a budget is of


def flops(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """FLOPs of one sample (a multiply-add is 2), by the name of each prunable tensor.

    The paper's counting (tables 2 to 5): 2 * weights * output positions, biases left out. `input_shape` is one
    sample's, (channels, height, width). A layer that is called several times counts each time; one that is never called
    counts 0. The module's modes are restored. Raises UserError where the network does not take this input.
    """
    layers = layers_by_tensor(module)
    counts = dict.fromkeys(layers, 0)

    def counter(name: str) -> Any:
        def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Each output channel of a position takes weights / channels multiply-adds, whatever the groups.
            counts[name] += 2 * layer.weight.numel() * (output.numel() // layer.weight.shape[0])

        return count

    handles = [layer.register_forward_hook(counter(name)) for name, users in layers.items() for layer in users]
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with evaluating(module), torch.no_grad():
            module(torch.zeros((1, *input_shape), dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"model.factory: the network does not take an input of shape {input_shape} (data.channels, data.size): "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return counts


def packed_bytes(weights: int, kept: int) -> int:
    """Predicted size of a packed tensor: fp32 values, and the smaller of a bitmask and Rice-coded gaps.

    With random positions a gap is geometric with q = 1 - density; Rice's code of width w takes 1 + w bits and
    one more for each 2^w that the gap holds, q^(2^w) / (1 - q^(2^w)) on average.
    """
    if kept == 0:
        return 0

    def bits(width: int) -> float:
        beyond = (1.0 - kept / weights) ** (2**width)
        return 1 + width + beyond / (1.0 - beyond)

    # bits() falls and then rises: its minimum is where about half of the gaps need a further bit.
    near = min(18, max(3, round(math.log2(math.log(2) * weights / kept))))
    gaps = min(kept * bits(width) for width in range(near - 2, near + 3)) / 8
    return math.ceil(min(4 * weights, 4 * kept + min(gaps, weights / 8)))


def price(quantity: Quantity, weights: int, flops: int) -> Callable[[int], int]:
    """The cost of a tensor as a function of its kept weights, in weights, FLOPs or bytes; `flops` are the dense
    tensor's.
    """
    if quantity == "flops":
        each = flops // weights
        return lambda kept: each * kept
    if quantity == "bytes":
        return lambda kept: packed_bytes(weights, kept)
    return lambda kept: kept
