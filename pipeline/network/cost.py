"""What a network's layers cost: floating point operations, and predicted packed bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.network.layers import weights_by_tensor
from pipeline.network.modes import evaluating
from pipeline.network.operators import Operators, Product, watching

Quantity = Literal["weights", "flops", "bytes", "latency"]  # what a budget is of; latency in ns


@dataclass(frozen=True)
class Counted:
    """FLOPs of one sample (a multiply-add is 2), by the weight that an operator multiplied by.

    `by_tensor` has every weight of `weights_by_tensor`. `unattributed` are FLOPs of products without a single weight:
    of attention's activations with each other, or by a weight computed from several. `unused` names weights that the
    forward pass never reads, `uncounted` those that it reads, but of whose products none could be attributed, and
    `outside` those that are multiplied by outside of a call of their own layer: by attention, or by F.linear.
    """

    by_tensor: dict[str, int]
    unattributed: int
    unused: tuple[str, ...]
    uncounted: tuple[str, ...]
    outside: tuple[str, ...]


class _Counter(Operators):
    """Adds up the FLOPs of each weight."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__(weights)
        self.flops = dict.fromkeys(weights, 0)
        self.unattributed = 0
        self.outside: set[str] = set()
        self._weights_named = weights

    def on_product(self, product: Product) -> None:
        if product.name is None:
            self.unattributed += product.flops
            return
        self.flops[product.name] += product.flops
        if product.layer is None or product.layer._parameters.get("weight") is not self._weights_named[product.name]:
            self.outside.add(product.name)


def count(module: nn.Module, input_shape: tuple[int, ...]) -> Counted:
    """Count the FLOPs of one forward pass in evaluation mode on one sample of `input_shape`, (channels, height, width).

    The paper's counting (tables 2 to 5): 2 * weights * output positions, biases left out. Whoever multiplies by a
    weight counts, each time: a layer, attention, F.linear, several layers that share it. The module's modes are
    restored. Raises UserError where the network does not take this input.
    """
    weights = weights_by_tensor(module)
    counter = _Counter(weights)
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with evaluating(module), torch.no_grad(), watching(module, counter):
            module(torch.zeros((1, *input_shape), dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"model.factory: the network does not take an input of shape {input_shape} (data.channels, data.size): "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    idle = [name for name, found in counter.flops.items() if not found]
    return Counted(
        by_tensor=counter.flops,
        unattributed=counter.unattributed,
        unused=tuple(name for name in idle if name not in counter.read),
        uncounted=tuple(name for name in idle if name in counter.read),
        outside=tuple(name for name in weights if name in counter.outside),
    )


def flops(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """The FLOPs that `count` finds, by the name of each weight; 0 for one that is never multiplied by."""
    return count(module, input_shape).by_tensor


def packed_bytes(weights: int, kept: int, codebook_bits: int | None = None) -> int:
    """Predicted size of a packed tensor: fp32 values, and the smaller of a bitmask and Rice-coded gaps.

    With a codebook: so many bits a value, the entropy of the mask, and a codebook in half precision. Uneven values and
    empty rows make the file smaller than that, tables a little larger.
    With random positions a gap is geometric with q = 1 - density; Rice's code of width w takes 1 + w bits and
    one more for each 2^w that the gap holds, q^(2^w) / (1 - q^(2^w)) on average.
    """
    if kept == 0:
        return 0
    if codebook_bits is not None:
        density = kept / weights
        mask = -sum(weights * share * math.log2(share) for share in (density, 1 - density) if share)
        return math.ceil(min(4 * weights, (kept * codebook_bits + mask) / 8 + 2 * min(kept, 2**codebook_bits)))

    def bits(width: int) -> float:
        beyond = (1.0 - kept / weights) ** (2**width)
        return 1 + width + beyond / (1.0 - beyond)

    # bits() falls and then rises: its minimum is where about half of the gaps need a further bit.
    near = min(18, max(3, round(math.log2(math.log(2) * weights / kept))))
    gaps = min(kept * bits(width) for width in range(near - 2, near + 3)) / 8
    return math.ceil(min(4 * weights, 4 * kept + min(gaps, weights / 8)))


def amount(number: int, quantity: Quantity) -> str:
    """A number of these in words, but for the word of weights, FLOPs and bytes."""
    return f"{number / 1e6:.3g} ms" if quantity == "latency" else f"{number:,}"


def price(quantity: Quantity, weights: int, flops: int) -> Callable[[int], int]:
    """The cost of a tensor as a function of its kept weights, in weights, FLOPs or bytes; `flops` are the dense
    tensor's.
    """
    if quantity == "flops":
        return lambda kept: kept * flops // weights
    assert quantity != "latency", "layers have no latency alone"
    if quantity == "bytes":
        return lambda kept: packed_bytes(weights, kept)
    return lambda kept: kept
