"""How far the outputs of two networks are apart, which are meant to be the same function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 (torch has no public name for it)

from pipeline.network.modes import evaluating

ROUNDING = 1e-2  # what passes for rounding (TF32 rounds to 1e-3)
TINY = 1e-6  # outputs that are all smaller are compared with this


@torch.no_grad()
def apart(first: nn.Module, second: nn.Module, like: Tensor) -> float:
    """The largest difference of their outputs in evaluation mode, as a share of the first one's largest output.

    The inputs are random and shaped as `like`, (batch, ...). Infinite where one gives a number and the other none, or
    where their outputs are not shaped alike. Raises what a network raises that does not take its own sizes.
    """
    inputs = like
    if like.is_floating_point():
        inputs = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    with evaluating(first), evaluating(second):
        wanted, got = _tensors(first(inputs)), _tensors(second(inputs))
    if [each.shape for each in wanted] != [each.shape for each in got]:
        return float("inf")
    return max((_difference(*pair) for pair in zip(wanted, got, strict=True)), default=0.0)


def _difference(wanted: Tensor, got: Tensor) -> float:
    numbers = wanted.isfinite()
    if not torch.equal(numbers, got.isfinite()):
        return float("inf")
    wanted, got = wanted[numbers].double(), got[numbers].double()
    if not len(wanted):
        return 0.0
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=TINY))


def _tensors(output: object) -> list[Tensor]:
    """The tensors of floating point in an output, of whatever form."""
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
