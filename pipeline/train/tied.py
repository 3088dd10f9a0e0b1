"""Weights that share values while they are trained: one number for all weights of a centroid (Han et al. 2016, 3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sharing:
    """Which weights of one tensor share values; all others of it are 0, and stay so.

    `members` are the flat places of all of them, int64, those of the first centroid first; `sizes`, int64, how many
    each centroid has, 1 or more.
    """

    members: Tensor
    sizes: Tensor

    @property
    def first(self) -> Tensor:
        """The place of each centroid's first weight, which stands for the centroid."""
        return self.members[self.sizes.cumsum(0) - self.sizes]


class Tied:
    """Keeps the weights of each centroid equal, to the bit, on every rank. `shared` is by parameter name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], shared: Mapping[str, Sharing]) -> None:
        self._all = [(parameters[name], sharing, sharing.first) for name, sharing in shared.items()]

    @torch.no_grad()
    def gather(self) -> None:
        """Give each weight its centroid's gradient, the sum of its weights' gradients, divided by their number.

        The learning rate of a centroid is so that of the recipe divided by its number of weights: a sum over thousands
        of them would leave the range in which the recipe's rate is stable. The sums are made in one order everywhere.
        """
        for parameter, sharing, _ in self._all:
            if parameter.grad is not None:
                members = parameter.grad.contiguous().view(-1)[sharing.members]
                # `unsafe`: without checks of the lengths, for which the host would wait for the device.
                put(parameter.grad, sharing, torch.segment_reduce(members, "mean", lengths=sharing.sizes, unsafe=True))

    @torch.no_grad()
    def tie(self) -> None:
        """Give each weight the value of its centroid's first weight."""
        for parameter, sharing, first in self._all:
            put(parameter, sharing, parameter.detach().contiguous().view(-1)[first])


@torch.no_grad()
def put(tensor: Tensor, sharing: Sharing, values: Tensor) -> None:
    """Set the weights of each centroid to its value, and all others to 0; `values` has one a centroid."""
    flat = tensor.new_zeros(tensor.numel())
    flat[sharing.members] = values.to(flat).repeat_interleave(sharing.sizes, output_size=len(sharing.members))
    tensor.copy_(flat.view(tensor.shape))
