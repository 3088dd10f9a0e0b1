"""Follows heads of attention that a network's own code splits off: by a view, through their products, and back.

A head is one unit: all rows that make its queries, keys and values, and all columns that read it. Between the step that
splits features into (heads, numbers) or (3, heads, numbers) and the one that joins them again, the units of a tensor
lie along several of its axes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import fx, nn

from pipeline.network.operations import (
    BINARY,
    CHUNKS,
    COPIES,
    FLATTENS,
    MATRIX_PRODUCTS,
    PERMUTES,
    POINTWISE,
    RESHAPES,
    SAME,
    SOFTMAXES,
    TRANSPOSES,
    UNBINDS,
    UNFLATTENS,
    in_place,
    named_sizes,
)
from pipeline.network.signals import Flags, Numbers, Signal, Units, bind

ATTENDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass
class Split:
    """A tensor whose units lie along several axes: `axes`, which rise, are those of `units` in the tensor.

    `storage` is as for a Signal.
    """

    units: Numbers
    axes: tuple[int, ...]
    storage: fx.Node


@dataclass
class Reshaped:
    """A step that splits or joins features: its result has `units` along `axis` and the axes after it."""

    node: fx.Node
    axis: int
    units: Numbers

    def sizes(self, stays: Flags) -> dict[int, int]:
        """What numbers in the code become: the new ones, by their place among the sizes that the call names.

        `stays` are flags for all roots of units, (units,), as shaped as `units`. What does not change is left out, and
        so is what the code leaves open (-1).
        """
        found = {}
        for axis, size in enumerate(self.units.shape):
            left = int(stays.any(tuple(other for other in range(stays.ndim) if other != axis)).sum())
            if left != size and self._fixed(axis):
                found[self._place(axis)] = left
        return found

    def hard_coded(self, roots: Numbers) -> bool:
        """Whether the code names a size that is another one when a unit goes; `roots` are shaped as `units`."""
        differ = [bool((roots != roots.take([0], axis)).any()) for axis in range(roots.ndim)]
        return any(differs and self._fixed(axis) for axis, differs in enumerate(differ))

    def _place(self, axis: int) -> int:
        return axis if self.node.target in UNFLATTENS else self.axis + axis

    def _fixed(self, axis: int) -> bool:
        return named_sizes(self.node)[self._place(axis)] != -1


class Heads:
    """Follows steps from a split to a join: `tensors` are what they make, `reshaped` are the splits and the joins.

    `shapes` are those of all tensors; `signals` those of tensors that are not split, to which this adds joined ones.
    """

    def __init__(
        self, module: nn.Module, shapes: Mapping[fx.Node, tuple[int, ...]], units: Units, signals: dict[fx.Node, Signal]
    ) -> None:
        self.tensors: dict[fx.Node, Split] = {}
        self.reshaped: list[Reshaped] = []
        self._parts: dict[fx.Node, list[Split] | list[Signal]] = {}
        self._module, self._shapes, self._units, self._signals = module, shapes, units, signals

    def follow(self, node: fx.Node) -> bool:
        """Handle a step on such a way; False for any other."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source in self._parts:
            return node.target is operator.getitem and self._take(node, self._parts[source])
        if source in self._signals:
            return self._begin(node, source, self._signals[source])
        if source in self.tensors:
            return self._between(node, source, self.tensors[source])
        return False

    def parts(self, node: fx.Node) -> Sequence[Split | Signal]:
        """What a step makes that gives several parts of a tensor; none for any other."""
        return self._parts.get(node, ())

    def settle(self) -> None:
        """Once all is followed: what was split stays whole where not all units at one place along an axis are one."""
        for each in self.reshaped:
            roots = self._units.roots(each.units)
            by_axis = (np.moveaxis(roots, axis, 0).reshape(size, -1) for axis, size in enumerate(roots.shape))
            if not any(bool((rows == rows[:, :1]).all()) for rows in by_axis):
                self._units.pin(each.units)

    def _begin(self, node: fx.Node, source: fx.Node, x: Signal) -> bool:
        """The features of a tensor along more axes than one, or in parts of equal size that lose the same units."""
        before, after = self._shapes[source], self._shapes.get(node, ())
        last = len(before) - 1
        if x.axis != last:
            return False
        if node.target in CHUNKS:
            given = bind(node, ("input", "chunks", "dim"))
            count = given.get("chunks")
            if given.get("dim", 0) not in (last, -1) or not isinstance(count, int) or len(x.units) % count:
                return False
            parts = [x.units.reshape(count, -1)[number] for number in range(count)]
            for part in parts[1:]:
                self._units.join(parts[0], part)
            constants = zip(x.known.chunk(count), x.value.chunk(count), strict=True)
            self._parts[node] = [
                Signal(part, known, value, x.storage, last)
                for part, (known, value) in zip(parts, constants, strict=True)
            ]
            return True
        if node.target not in RESHAPES or len(after) <= len(before) or before[:last] != after[:last]:
            return False
        split = Split(x.units.reshape(after[last:]), tuple(range(last, len(after))), x.storage)
        return self._reshape(node, last, split.units) and self._made(node, split)

    def _between(self, node: fx.Node, source: fx.Node, x: Split) -> bool:
        shape = self._shapes[source]
        if node.op == "call_module":
            return self._through(node, x, len(shape))
        if node.target in UNBINDS or (node.target is operator.getitem and isinstance(node.args[1], int)):
            return self._unbind(node, x, shape)
        if node.target in PERMUTES | TRANSPOSES:
            return self._permute(node, x, len(shape))
        if node.target in RESHAPES | FLATTENS:
            return self._join(node, x, shape)
        if node.target is F.scaled_dot_product_attention:
            return self._attend(node)
        if node.target in MATRIX_PRODUCTS:
            return self._multiply(node, [*node.args])
        if node.target in SOFTMAXES:
            along = bind(node, ("input", "dim")).get("dim")
            return isinstance(along, int) and along % len(shape) not in x.axes and self._made(node, self._copy(node, x))
        if node.target in COPIES:
            return self._made(node, x)
        if node.target not in POINTWISE | BINARY or in_place(node):
            return False
        others = [other for other in node.all_input_nodes if other is not source]
        x = self._copy(node, x)
        return self._alike(x, others) and self._made(node, x)

    def _made(self, node: fx.Node, split: Split) -> bool:
        self.tensors[node] = split
        return True

    def _copy(self, node: fx.Node, x: Split) -> Split:
        """The same units in memory of its own."""
        return Split(x.units, x.axes, node)

    def _alike(self, x: Split, others: list[fx.Node]) -> bool:
        """Whether all others are split as `x` is; their units are joined with its own then."""
        found = [self.tensors.get(other) for other in others]
        if any(y is None or y.axes != x.axes or y.units.shape != x.units.shape for y in found):
            return False
        for y in found:
            assert y is not None
            self._units.join(x.units.ravel(), y.units.ravel())
        return True

    def _through(self, node: fx.Node, x: Split, rank: int) -> bool:
        """A module that mixes no heads: one that does nothing in evaluation, a norm of each head's numbers."""
        module: Any = self._module.get_submodule(str(node.target))
        if len(node.args) != 1 or node.kwargs or module._forward_hooks or module._forward_pre_hooks:
            return False
        if type(module) in NORMS and len(module.normalized_shape) == 1:
            return self._heads(x, rank) is not None and self._made(node, self._copy(node, x))
        return type(module) in SAME and self._made(node, x)

    def _take(self, node: fx.Node, parts: list[Split] | list[Signal]) -> bool:
        """One of the parts of a tensor, by its number."""
        if not isinstance(node.args[1], int):
            return False
        part = parts[node.args[1]]
        if isinstance(part, Signal):
            self._signals[node] = part
            return True
        return self._made(node, part)

    def _unbind(self, node: fx.Node, x: Split, shape: tuple[int, ...]) -> bool:
        """Parts along an axis, whose units need not go together: of queries, keys and values."""
        select = node.target is operator.getitem
        named = 0 if select else bind(node, ("input", "dim")).get("dim", 0)
        along = named % len(shape) if isinstance(named, int) else -1
        if along not in x.axes:
            return False
        axes = tuple(axis - (axis > along) for axis in x.axes if axis != along)
        units = np.moveaxis(x.units, x.axes.index(along), 0)
        parts = [Split(part, axes, x.storage) for part in units]
        if select:
            return self._take(node, parts)
        self._parts[node] = parts
        return True

    def _permute(self, node: fx.Node, x: Split, rank: int) -> bool:
        given = named_sizes(node)
        if not all(isinstance(axis, int) for axis in given):
            return False
        named = [axis % rank for axis in given]
        order = [*range(rank)]
        if node.target in TRANSPOSES and len(named) == 2:
            order[named[0]], order[named[1]] = named[1], named[0]
        elif node.target in PERMUTES and len(named) == rank:
            order = named
        else:
            return False
        moved = {order.index(axis): number for number, axis in enumerate(x.axes)}
        axes = tuple(sorted(moved))
        return self._made(node, Split(x.units.transpose([moved[axis] for axis in axes]), axes, x.storage))

    def _join(self, node: fx.Node, x: Split, before: tuple[int, ...]) -> bool:
        """Heads and their numbers, which lie last, as features again."""
        first = x.axes[0]
        if x.axes != tuple(range(first, len(before))) or self._shapes[node] != (*before[:first], x.units.size):
            return False
        if first == 0 or not (node.target in FLATTENS or self._reshape(node, first, x.units.ravel())):
            return False
        self._signals[node] = Signal.without_constants(x.units.ravel(), x.storage, first)
        return True

    def _reshape(self, node: fx.Node, axis: int, units: Numbers) -> bool:
        expected = units.ndim if node.target in UNFLATTENS else len(self._shapes[node])
        if len(named_sizes(node)) != expected:  # they are given by keyword, or one step makes them
            return False
        self.reshaped.append(Reshaped(node, axis, units))
        return True

    def _attend(self, node: fx.Node) -> bool:
        given = bind(node, ATTENDS)
        if set(given) - {*ATTENDS, "scale"}:
            return False
        mask = given.get("attn_mask")
        query, rank = self.tensors[given["query"]], len(self._shapes[node])
        if isinstance(mask, fx.Node):
            shape = (1,) * rank + self._shapes.get(mask, (0,))
            if mask in self.tensors or any(shape[axis - rank] != 1 for axis in query.axes if axis < rank - 2):
                return False
            if mask in self._signals:
                self._units.pin(self._signals[mask].units)
        return self._multiply(node, [given["query"], given["key"], given["value"]])

    def _multiply(self, node: fx.Node, factors: list[Any]) -> bool:
        """Products of matrices, one for each head: each gives a head of the result."""
        if any(factor not in self.tensors for factor in factors):
            return False
        shape = self._shapes[node]
        splits, rank = [self.tensors[factor] for factor in factors], len(shape)
        outer = [tuple(axis for axis in split.axes if axis < rank - 2) for split in splits]
        wide = {self._shapes[factor][: rank - 2] for factor in factors}
        if len({*outer}) > 1 or wide != {shape[: rank - 2]}:
            return False
        heads = [self._heads(split, rank) for split in splits]
        first = heads[0]
        if first is None:
            return False
        for other in heads[1:]:
            assert other is not None
            self._units.join(first.ravel(), other.ravel())
        inner = [axis for axis, split in ((rank - 2, splits[0]), (rank - 1, splits[-1])) if axis in split.axes]
        units = np.broadcast_to(
            first.reshape(*first.shape, *[1] * len(inner)), (*first.shape, *(shape[axis] for axis in inner))
        )
        return self._made(node, Split(units, (*outer[0], *inner), node))

    def _heads(self, x: Split, rank: int) -> Numbers | None:
        """One unit for each head, by the axes before the last two; a head's own are joined. None without such axes."""
        outer = sum(axis < rank - 2 for axis in x.axes)
        if outer == 0:
            return None
        flat = x.units.reshape(*x.units.shape[:outer], -1)
        for number in range(1, flat.shape[-1]):
            self._units.join(flat[..., 0].ravel(), flat[..., number].ravel())
        return flat[..., 0]
