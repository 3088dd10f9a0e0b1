"""What is known of a network's channels: units, constants, and the arithmetic of constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import DisjointSet
from torch import Tensor, fx

from pipeline.network.layers import CONVOLUTIONS

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Units:
    """Numbers for units. `join` makes two units the same; a unit after `pin` always stays."""

    def __init__(self) -> None:
        self._sets = DisjointSet()
        self._pinned: set[int] = set()

    def __len__(self) -> int:
        return len(self._sets)

    def new(self, count: int) -> Numbers:
        """`count` new units, not joined with any other."""
        made = np.arange(len(self), len(self) + count, dtype=np.int64)
        for unit in made.tolist():
            self._sets.add(unit)
        return made

    def pin(self, units: Numbers) -> None:
        """These stay."""
        self._pinned.update(units.ravel().tolist())

    def join(self, first: Numbers, second: Numbers) -> None:
        """Each of `first` becomes one with its partner in `second`."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self._sets.merge(a, b)

    def roots(self, units: Numbers) -> Numbers:
        """The one number (root) for each unit and all units that it was joined with; shaped as `units`."""
        return np.array([self._sets[unit] for unit in units.ravel().tolist()], dtype=np.int64).reshape(units.shape)

    def pinned(self) -> Numbers:
        """The roots of all pinned units."""
        return self.roots(np.array(sorted(self._pinned), dtype=np.int64))


@dataclass
class Signal:
    """A tensor of the graph: for each position along `axis`, its unit, and its value where that is constant.

    `axis` is 1, or the last one of a tensor with more than two whose features a linear layer made.
    `known` is (C,) bool and `value` (C,) float64, both on the CPU; value is 0 where not known. `storage` is the step
    that made its memory: an in-place change affects every signal in the same memory.
    """

    units: Numbers
    known: Tensor
    value: Tensor
    storage: fx.Node
    axis: int = 1

    @classmethod
    def without_constants(cls, units: Numbers, storage: fx.Node, axis: int = 1) -> Signal:
        """A tensor of which no value is known."""
        nothing = torch.zeros(len(units), dtype=torch.float64)
        return cls(units, nothing.bool(), nothing, storage, axis)

    def __post_init__(self) -> None:
        self.known = self.known & self.value.isfinite()
        self.value = torch.where(self.known, self.value, 0.0)


@dataclass
class Layer:
    """A linear or convolution layer between units, or one of the two that attention holds.

    `reads` is (groups, outputs of a group, inputs of a group): whether the weight there is not all 0. `fold[j]`: input
    j is a constant, `value[j]`, whose whole effect is a number to add to the bias. A depthwise layer's outputs are its
    inputs' own units. `names` are the module's attributes that hold the weight and the bias.
    """

    path: str
    module: Any
    inputs: Numbers
    outputs: Numbers
    reads: Tensor
    fold: Tensor
    value: Tensor
    depthwise: bool
    names: tuple[str, str] = ("weight", "bias")

    @property
    def weight(self) -> Tensor:
        """As its module holds it: (outputs, inputs of a group, ...)."""
        found: Tensor = getattr(self.module, self.names[0])
        return found

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), or None."""
        found: Tensor | None = getattr(self.module, self.names[1])
        return found

    @property
    def tensors(self) -> tuple[str, str]:
        """The full names of weight and bias."""
        weight, bias = (f"{self.path}.{name}" if self.path else name for name in self.names)
        return weight, bias


@dataclass
class Carrier:
    """A module with a parameter for each channel that passes by: a batch norm, a PReLU."""

    path: str
    module: Any
    units: Numbers


def zero_padded(layer: Any) -> bool:
    """Whether a layer pads with zeros, so that a constant input is not constant at the border."""
    if not isinstance(layer, CONVOLUTIONS) or layer.padding_mode != "zeros":
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" and any(size > 1 for size in layer.kernel_size)
    return any(size > 0 for size in layer.padding)


def constant_part(weight: Tensor, groups: int, chosen: Tensor, value: Tensor) -> Tensor:
    """What the `chosen` inputs add to each output, (outputs,) float64 on the CPU; input j is the constant value[j]."""
    weight = weight.detach()
    outputs, inputs = len(weight) // groups, weight.shape[1]
    total = torch.zeros(len(weight), dtype=torch.float64)
    matter = chosen & (value != 0)
    for group in torch.unique(matter.nonzero().flatten() // inputs).tolist():
        columns = matter[group * inputs : (group + 1) * inputs].nonzero().flatten()
        rows = slice(group * outputs, (group + 1) * outputs)
        kernels = weight[rows][:, columns.to(weight.device)].double().flatten(2).cpu() if weight.ndim > 2 else (
            weight[rows][:, columns.to(weight.device)].double().unsqueeze(2).cpu()
        )  # fmt: skip
        total[rows] = kernels.sum(2) @ value[group * inputs + columns]
    return total


def max_keeps(padding: int | Sequence[int], dilation: int | Sequence[int]) -> bool:
    """Whether max pooling keeps a constant: always, except where a dilated window could lie wholly in the padding."""
    return _none(padding) or dilation == 1 or (not isinstance(dilation, int) and set(dilation) == {1})


def average_keeps(padding: int | Sequence[int], count_padding: bool, divisor: int | None) -> bool:
    """Whether average pooling keeps a constant."""
    return divisor is None and (_none(padding) or not count_padding)


def bind(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def tied(module: fx.GraphModule) -> set[int]:
    """The modules, by id, that share a parameter with another or whose parameter the network also uses directly."""
    owners: dict[int, set[int]] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(part))
    direct = Counter(str(node.target) for node in module.graph.nodes if node.op == "get_attr")
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in direct:
            owners[id(parameter)].add(0)
    return {owner for shared in owners.values() if len(shared) > 1 for owner in shared}


def _none(padding: int | Sequence[int]) -> bool:
    return padding == 0 or (not isinstance(padding, int) and not any(padding))
