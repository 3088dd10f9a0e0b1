"""Which weight each multiplication of a forward pass uses, seen where torch dispatches operators: whoever calls them.

A layer, F.linear on a layer's weight, attention, a view or a cast of a weight: all end in a few operators. The formulas
are those of torch.utils.flop_counter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload  # noqa: PLC2701 (torch has no public name for it)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 (torch has no public name for it)
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 (torch has no public name for it)
from torch.utils.flop_counter import addmm_flop, flop_registry, sdpa_flop

from pipeline.network.layers import ACTIVATIONS, LAYERS, NORMS

aten = torch.ops.aten


def _mv_flop(matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _addmv_flop(added: Tensor, matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


# What torch counts, and what it leaves out.
_FORMULAS = {
    aten._addmm_activation: addmm_flop,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten.mv: _mv_flop,
    aten.addmv: _addmv_flop,
    **flop_registry,
}

# Where the factors stand among the arguments; elsewhere they are the first two.
_AFTER_A_TERM = slice(1, 3)
_FACTORS = {
    aten.addmm: _AFTER_A_TERM, aten.baddbmm: _AFTER_A_TERM, aten.addmv: _AFTER_A_TERM,
    aten._addmm_activation: _AFTER_A_TERM,
}  # fmt: skip

# These read a tensor's shape, and none of its values.
_SHAPE_ONLY = {
    aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like, aten.new_empty,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided,
}  # fmt: skip

_ALIASES = {aten.detach, aten.alias}

Names = frozenset[str]
_NONE: Names = frozenset()


@dataclass(frozen=True)
class Product:
    """A multiplication: an operator, its FLOPs, and the weight that it uses.

    `name` is None where no single weight is a factor: activations times activations, or a weight that was computed from
    several. `factors` are what is multiplied, `weights` those of them that stem from weights, `layer` is the linear or
    convolution layer in whose call it runs, if any.
    """

    name: str | None
    flops: int
    factors: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    result: Tensor
    layer: nn.Module | None


class Operators(TorchDispatchMode):
    """Follows `weights`, by name, through a forward pass; enter it by `watching`.

    Every tensor's origins are known by its memory, so that views are followed as they are: the weights that it was
    computed from, or None for what a multiplication made (activations). `read` are the weights whose values an operator
    used. Subclasses say what to do with each product, and with each other operator.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.inside: list[nn.Module] = []
        self._weights: dict[int, list[tuple[int, int, str]]] = {}
        for name, weight in weights.items():
            start = int(weight.storage_offset())
            self._weights.setdefault(key(weight), []).append((start, start + weight.numel(), name))
        # The weak reference keeps the number of a memory that is gone from being given to another.
        self._origins: dict[int, tuple[StorageWeakRef, Names | None]] = {}

    def on_product(self, product: Product) -> None:
        """Called after each multiplication."""

    def on_other(self, packet: Any, tensors: Sequence[Tensor], result: Any) -> None:
        """Called after each other operator: its overload packet, its tensors, and its result."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = _FORMULAS.get(packet)
        if formula is None and isinstance(func, OpOverload) and packet is not torch.ops.prim.device:
            with self:
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        result = func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        origins = [_NONE if packet in _SHAPE_ONLY else self._origin(tensor) for tensor in tensors]
        if not (getattr(func, "is_view", False) or packet in _ALIASES):
            self.read.update(*(found for found in origins if found))
        made = None if None in origins else _NONE.union(*(found for found in origins if found))
        if formula is not None:
            factors = _tensors(args[_FACTORS.get(packet, slice(0, 2))])
            name, weights, activations = self._weight_among(factors)
            made = None if activations else made
            first = _tensors(result)[0]
            flops = int(formula(*args, **kwargs, out_val=result))
            self.on_product(Product(name, flops, tuple(factors), weights, first, self._layer()))
        else:
            self.on_other(packet, tensors, result)
        for tensor in _tensors(result):
            if (place := key(tensor)) and place not in self._weights:
                self._origins[place] = (StorageWeakRef(tensor.untyped_storage()), made)
        return result

    def _origin(self, tensor: Tensor) -> Names | None:
        held = self._weights.get(key(tensor))
        if held is None:
            return self._origins.get(key(tensor), (None, _NONE))[1]
        if len(held) == 1:
            return frozenset([held[0][2]])
        return frozenset(name for start, end, name in held if start <= tensor.storage_offset() < end)

    def _weight_among(self, factors: Sequence[Tensor]) -> tuple[str | None, tuple[Tensor, ...], bool]:
        """The one weight that the factors stem from, those that do, and whether another factor stems from none."""
        found = [self._origin(factor) for factor in factors]
        names = _NONE.union(*(origin for origin in found if origin))
        weights = tuple(factor for factor, origin in zip(factors, found, strict=True) if origin)
        return next(iter(names)) if len(names) == 1 else None, weights, len(weights) < len(factors)

    def _layer(self) -> nn.Module | None:
        return next((part for part in reversed(self.inside) if isinstance(part, LAYERS)), None)


@contextmanager
def watching(module: nn.Module, operators: Operators) -> Iterator[None]:
    """In this block the operators of `module`'s forward passes are seen.

    Attention takes no fused path, in which torch shows no single operators; the setting comes back afterwards.
    """
    handles, inside = [], operators.inside

    def leave(part: nn.Module, given: Any, output: Any) -> None:
        inside.pop()

    for part in module.modules():
        if isinstance(part, LAYERS + NORMS + ACTIVATIONS):
            handles.append(part.register_forward_pre_hook(lambda part, given: inside.append(part), prepend=True))
            handles.append(part.register_forward_hook(leave, always_call=True))
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with operators:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        inside.clear()
        for handle in handles:
            handle.remove()


def key(tensor: Tensor) -> int:
    """A number for a tensor's memory, the same for all its views; 0 where it has no plain memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
