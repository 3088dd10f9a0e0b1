"""A network without the channels that its masks remove, for training, and the way back to the whole one.

Masks of whole channels leave out each weight that reads a removed channel. So nothing of it reaches an output, whatever
its bias and its norm make of it: the small network is cut out of the whole one, and nothing is folded (as it is where
single weights are pruned, see `pipeline.network.compact`). What was cut away is 0 in the whole network afterwards, so
that a removed channel gives 0, and does not count as active.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.network.compact import resize
from pipeline.network.groups import Groups


@dataclass(frozen=True)
class Small:
    """A network cut out of a whole one, with the same names of parameters and buffers.

    `places` has, for each tensor that is smaller than in the whole network, where its rows lie there, and (of weights)
    its columns: int64, rising, on the CPU.
    """

    model: nn.Module
    places: dict[str, tuple[Tensor, ...]]

    @property
    def digest(self) -> str:
        """The same for networks cut in the same places, and for no others: SHA-256, cut."""
        total = hashlib.sha256()
        for name in sorted(self.places):
            total.update(f"{name} {[lines.tolist() for lines in self.places[name]]}".encode())
        return total.hexdigest()[:16]

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the small network has of tensors shaped as those of the whole one (weights, masks), by name."""
        return {name: tensor[self._at(name, tensor)].contiguous() for name, tensor in tensors.items()}

    def put_back(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors shaped as those of the `whole` network: the small one's in their places, and 0 elsewhere."""
        small = self.model.state_dict()
        made = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
        for name, tensor in made.items():
            tensor[self._at(name, tensor)] = small[name]
        return made

    def _at(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """The index of the small network's entries in a tensor of the whole one; () for all."""
        lines = [each.to(tensor.device) for each in self.places.get(name, ())]
        return (lines[0][:, None], lines[1]) if len(lines) == 2 else tuple(lines)


@torch.no_grad()
def shrink(model: nn.Module, groups: Groups, masks: Mapping[str, Tensor]) -> Small:
    """A copy of `model` that has only the channels which stay in `masks`, in its mode and on its device.

    `masks` are of whole channels, by tensor; weights that they leave out are 0. `groups` are those of the network.
    """
    gone = groups.gone(groups.alive(masks))
    first: dict[int, str] = {}
    places: dict[str, tuple[Tensor, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # a module may lie under two names
        lines = gone.get(first.setdefault(id(tensor), name))
        if lines is not None and any(lines):
            places[name] = tuple(_staying(size, each) for size, each in zip(tensor.shape, lines, strict=False))
    small = Small(copy.deepcopy(model), places)
    given = small.cut(model.state_dict())
    resize(small.model, {name: tuple(given[name].shape) for name in places})
    small.model.load_state_dict(given)
    return small


def _staying(size: int, gone: list[int]) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()
