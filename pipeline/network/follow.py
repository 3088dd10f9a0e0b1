"""Follows channels through a network: which are the same unit, and which always hold one number.

A unit is a channel (or a feature) wherever it goes: through norms, activations, pooling, flatten (where one channel
becomes a block of features) and concatenation. Where two channels are added or multiplied they become one unit, since
they can only be removed together. Only linear and convolution layers make new units, and attention, of which a head is
one unit.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pipeline.network.attention import Heads, Reshaped, Split
from pipeline.network.heads import PROJECTION
from pipeline.network.layers import ACTIVATIONS, ATTENTION, LAYERS
from pipeline.network.operations import (
    ADAPTIVE_FUNCTIONS,
    ADAPTIVE_POOLS,
    AVG_ARGUMENTS,
    AVG_POOLS,
    BATCH_NORMS,
    BINARY,
    CONCATENATIONS,
    COPIES,
    MAX_ARGUMENTS,
    MAX_POOLS,
    POINTWISE,
    POOLED,
    PRODUCTS,
    QUOTIENTS,
    SAME,
    as_function,
    dropout_arguments,
    in_place,
    only_reads_size,
)
from pipeline.network.signals import (  # fmt: skip
    Carrier,
    Layer,
    Numbers,
    Signal,
    Units,
    average_keeps,
    bind,
    constant_part,
    max_keeps,
    tied,
    zero_padded,
)
from pipeline.network.trace import Traced


class Follower:
    """Walks the graph once, in order. The results are in `units`, `layers`, `carriers` and `notes`."""

    def __init__(self, graph: Traced) -> None:
        self.units = Units()
        self.layers: list[Layer] = []
        self.carriers: list[Carrier] = []
        self.notes: list[str] = []
        self._graph = graph
        self._signals: dict[fx.Node, Signal] = {}
        self._calls = Counter(node.target for node in graph.module.graph.nodes if node.op == "call_module")
        self._tied = tied(graph.module) | self._held_by_steps()
        self._heads = Heads(graph.module, graph.shapes, self.units, self._signals)
        self._within: dict[fx.Node, NDArray[np.int64]] = {}
        for node in graph.module.graph.nodes:
            self._visit(node)
        self._heads.settle()

    @property
    def reshaped(self) -> list[Reshaped]:
        """The steps that split features into heads, or join them."""
        return self._heads.reshaped

    def made(self, node: fx.Node) -> Numbers:
        """The units of the channels that a step makes, within too; none where it makes no tensor that has channels."""
        found = self._found(node)
        units = np.zeros(0, np.int64) if found is None else found.units.ravel()
        return np.concatenate([units, self._within.get(node, units[:0])])

    def _found(self, node: fx.Node) -> Signal | Split | None:
        """What is known of the tensor that a step makes."""
        return self._signals.get(node) or self._heads.tensors.get(node)

    def _held(self, node: fx.Node) -> list[Signal | Split]:
        """What is known of the tensor, or the tensors, that a step makes."""
        found = self._found(node)
        return [*self._heads.parts(node)] if found is None else [found]

    def _held_by_steps(self) -> set[int]:
        """The modules, by id, within those whose code cannot be followed: they are called there any number of times."""
        steps = [self._graph.module.get_submodule(str(target)) for target in self._calls]
        return {
            id(part) for step in steps if type(step) not in ATTENTION for part in step.modules() if part is not step
        }

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            for source in node.all_input_nodes:
                self._pin(source)
            return
        if node.op == "placeholder":
            self._fresh(node, node)
        elif node.op == "get_attr":
            self.notes.append(f"{node.target} is used directly, not by a layer: what it meets is left alone")
            self._fresh(node, node)
        elif not self._only_reads_size(node) and not self._follow(node):
            self._leave(node)

    def _only_reads_size(self, node: fx.Node) -> bool:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        rank = len(self._graph.shapes.get(source, ())) if source is not None else 0
        return only_reads_size(node, rank, self._axes(source))

    def _axes(self, node: fx.Node | None) -> tuple[int, ...]:
        """The axes of a tensor along which its channels lie."""
        if node in self._heads.tensors:
            return self._heads.tensors[node].axes
        return (self._signals[node].axis if node in self._signals else 1,)

    def _follow(self, node: fx.Node) -> bool:
        """Handle a step; False if it is of no kind that can be followed."""
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source in self._within and node.target is operator.getitem:  # of the two that attention gives
            self._signals[node] = self._signals[source]
            return True
        if self._heads.follow(node):
            return True
        if node.op == "call_module" and type(self._graph.module.get_submodule(str(node.target))) in ATTENTION:
            return self._attention(node)
        if node not in self._graph.shapes:
            return False
        if node.op == "call_function" and node.target in CONCATENATIONS:
            return self._concatenate(node)
        x = self._signals.get(source) if source is not None else None
        if x is None:
            return False
        if node.op == "call_module":
            return len(node.args) == 1 and not node.kwargs and self._module(node, x)
        return self._function(node, x)

    def _module(self, node: fx.Node, x: Signal) -> bool:
        module: Any = self._graph.module.get_submodule(str(node.target))
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return False
        if kind in SAME:
            return self._carry(node, x, same=True)
        if kind in ACTIVATIONS and kind is not nn.PReLU:
            return self._pointwise(node, x, module, module.__dict__.get("inplace", False))
        if x.axis != 1 and kind is not nn.Linear:
            return False
        if not self._pools_no_channels(node, kind):
            return False
        if kind in MAX_POOLS:
            return not module.return_indices and self._carry(node, x, max_keeps(module.padding, module.dilation))
        if kind in AVG_POOLS:
            keeps = average_keeps(module.padding, module.count_include_pad, getattr(module, "divisor_override", None))
            return self._carry(node, x, keeps)
        if kind in ADAPTIVE_POOLS:
            return not getattr(module, "return_indices", False) and self._carry(node, x)
        if kind is nn.Flatten:
            return self._flatten(node, x, module.start_dim, module.end_dim)
        if self._calls[node.target] > 1 or id(module) in self._tied:
            return False
        if kind in LAYERS:
            return self._layer(node, x, module)
        if kind in BATCH_NORMS:
            return self._batch_norm(node, x, module)
        return kind is nn.PReLU and self._prelu(node, x, module)

    def _function(self, node: fx.Node, x: Signal) -> bool:
        target, others = node.target, node.args[1:]
        if target in BINARY and len(others) == 1 and isinstance(others[0], fx.Node):
            # A quotient of two channels that are removed is no number.
            return target not in QUOTIENTS and self._join(node, x, others[0])
        if any(source is not node.args[0] for source in node.all_input_nodes):
            return False
        if any(isinstance(given, fx.Node) for given in (*others, *node.kwargs.values())):  # the same tensor once more
            return False
        if target in COPIES:
            return self._carry(node, x, same=target == "contiguous")
        if target in POINTWISE or target in BINARY:
            call = as_function(target)
            return self._pointwise(node, x, lambda value: call(value, *others, **node.kwargs), in_place(node))
        if (names := dropout_arguments(target)) is not None:
            given = bind(node, names)
            return given.get("training", True) is False and self._carry(node, x, same=True)
        if x.axis != 1 or not self._pools_no_channels(node, target):
            return False
        if target is F.max_pool2d:
            given = bind(node, MAX_ARGUMENTS)
            keeps = max_keeps(given.get("padding", 0), given.get("dilation", 1))
            return not given.get("return_indices", False) and self._carry(node, x, keeps)
        if target is F.avg_pool2d:
            given = bind(node, AVG_ARGUMENTS)
            padding, divisor = given.get("padding", 0), given.get("divisor_override")
            return self._carry(node, x, average_keeps(padding, given.get("count_include_pad", True), divisor))
        if target in ADAPTIVE_FUNCTIONS:
            given = bind(node, ("input", "output_size", "return_indices"))
            return not given.get("return_indices", False) and self._carry(node, x)
        if target in (torch.flatten, "flatten"):
            given = bind(node, ("input", "start_dim", "end_dim"))
            return self._flatten(node, x, given.get("start_dim", 0), given.get("end_dim", -1))
        return target in (torch.mean, "mean") and self._mean(node, x)

    def _layer(self, node: fx.Node, x: Signal, layer: Any) -> bool:
        """Linear and convolution: reads units, makes new ones (depthwise: the same ones)."""
        weight = layer._parameters.get("weight")
        before = self._graph.shapes[node.all_input_nodes[0]]
        features = len(before) - 1 if isinstance(layer, nn.Linear) else 1  # the axis that the layer reads and makes
        if weight is None or not weight.is_floating_point() or (len(before) != weight.ndim and features == 1):
            return False
        if x.axis != features:
            x = self._turned(x, weight.shape[1], features)
        groups = getattr(layer, "groups", 1)
        depthwise = groups > 1 and groups == len(x.units)
        made = np.repeat(x.units, len(weight) // groups) if depthwise else self.units.new(len(weight))
        return self._product(node, x, str(node.target), layer, made, depthwise=depthwise)

    def _attention(self, node: fx.Node) -> bool:
        """Attention of a tensor to itself, (batch, tokens, width) or (tokens, batch, width), by torch's own module."""
        module: Any = self._graph.module.get_submodule(str(node.target))
        given = bind(node, ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"))
        masks = [given.get(name) for name in ("key_padding_mask", "attn_mask", "is_causal")]
        query: Any = given.get("query")
        x = self._signals.get(query)
        shape = self._graph.shapes.get(query, ())
        if x is None or given.get("key") is not query or given.get("value") is not query or any(masks):
            return False
        used = [user.args[1] if user.target is operator.getitem else None for user in node.users if user.users]
        plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
        hooked = module._forward_hooks or module._forward_pre_hooks
        shared = self._calls[node.target] > 1 or {id(module), id(module.out_proj)} & self._tied
        if not plain or hooked or shared or len(shape) != 3 or used != [0]:
            return False
        if x.axis != 2:
            x = self._turned(x, module.in_proj_weight.shape[1], 2)
        heads = self.units.new(module.num_heads)
        mixed = np.repeat(heads, module.head_dim)
        path = str(node.target)
        self._product(node, x, path, module, np.tile(mixed, 3), PROJECTION)
        within = Signal.without_constants(mixed, node, 2)
        made = self.units.new(len(module.out_proj.weight))
        self._within[node] = heads
        return self._product(node, within, f"{path}.out_proj", module.out_proj, made)

    def _product(
        self, node: fx.Node, x: Signal, path: str, module: Any, made: Numbers,
        names: tuple[str, str] = ("weight", "bias"), depthwise: bool = False,
    ) -> bool:  # fmt: skip
        """A layer's weight times a tensor, whose channels are of the units `made` then, along the same axis."""
        weight, bias = (getattr(module, name) for name in names)
        groups = getattr(module, "groups", 1)
        reads = (weight.detach() != 0).flatten(2).any(2) if weight.ndim > 2 else weight.detach() != 0
        reads = reads.reshape(groups, -1, weight.shape[1]).cpu()
        fold = x.known & ((x.value == 0) | (not zero_padded(module)))
        known = ~(reads & ~fold.view(groups, 1, -1)).any(2).flatten()
        added = constant_part(weight, groups, fold, x.value)
        value = added if bias is None else bias.detach().double().cpu() + added
        self._signals[node] = Signal(made, known, value, node, x.axis)
        self.layers.append(Layer(path, module, x.units, made, reads, fold, x.value, depthwise, names))
        stuck = int((x.known & ~fold & reads.any(1).flatten()).sum())
        if stuck:
            self.notes.append(f"{path}: {stuck} constant inputs are not 0 and stay: the layer pads with zeros, "
                              "so what they add differs at the border")  # fmt: skip
        return True

    def _turned(self, x: Signal, count: int, axis: int) -> Signal:
        """A tensor looked at along another axis, whose `count` units are new; they and those of before stay."""
        units = self.units.new(count)
        self.units.pin(x.units)
        self.units.pin(units)
        return Signal.without_constants(units, x.storage, axis)

    def _batch_norm(self, node: fx.Node, x: Signal, norm: Any) -> bool:
        """In evaluation: value -> (value - mean) / sqrt(var + eps) * weight + bias; where weight is 0, the bias."""
        if norm.running_mean is None or norm.running_var is None:
            return False
        stats = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
        mean, var, weight, bias = (None if t is None else t.detach().double().cpu() for t in stats)
        value = F.batch_norm(x.value.view(1, -1), mean, var, weight, bias, False, 0.0, norm.eps).view(-1)
        known = x.known if weight is None else x.known | (weight == 0)
        if weight is not None:
            value = torch.where(weight == 0, 0.0 if bias is None else bias, value)
        self._signals[node] = Signal(x.units, known, value, node)
        self.carriers.append(Carrier(str(node.target), norm, x.units))
        return True

    def _prelu(self, node: fx.Node, x: Signal, module: nn.PReLU) -> bool:
        value = F.prelu(x.value.view(1, -1), module.weight.detach().double().cpu()).view(-1)
        self._signals[node] = Signal(x.units, x.known, value, node)
        if module.num_parameters > 1:
            self.carriers.append(Carrier(str(node.target), module, x.units))
        return True

    def _pointwise(self, node: fx.Node, x: Signal, call: Callable[[Tensor], Tensor], changes: bool) -> bool:
        with torch.no_grad():
            value = call(x.value.clone().view(1, -1)).view(-1)
        self._signals[node] = Signal(x.units, x.known, value, x.storage if changes else node, x.axis)
        if changes:
            self._forget(x.storage, but=node)
        return True

    def _carry(self, node: fx.Node, x: Signal, keeps: bool = True, same: bool = False) -> bool:
        """A step that does not mix channels; without `keeps`, only a constant 0 stays constant."""
        known = x.known if keeps else x.known & (x.value == 0)
        self._signals[node] = Signal(x.units, known, x.value, x.storage if same else node, x.axis)
        return True

    def _flatten(self, node: fx.Node, x: Signal, start: Any, end: Any) -> bool:
        shape = self._graph.shapes[node.all_input_nodes[0]]
        if start != 1 or end not in (-1, len(shape) - 1):
            return False
        block = math.prod(shape[2:])
        units, known, value = np.repeat(x.units, block), x.known.repeat_interleave(block), x.value
        self._signals[node] = Signal(units, known, value.repeat_interleave(block), x.storage)
        return True

    def _mean(self, node: fx.Node, x: Signal) -> bool:
        rank = len(self._graph.shapes[node.all_input_nodes[0]])
        axes = bind(node, ("input", "dim", "keepdim")).get("dim")
        axes = [axes] if isinstance(axes, int) else axes
        if not isinstance(axes, list | tuple) or any(not isinstance(axis, int) or axis % rank < 2 for axis in axes):
            return False
        return self._carry(node, x)

    def _pools_no_channels(self, node: fx.Node, kind: Any) -> bool:
        """Whether a step is no pool, or one that takes its tensor for a batch: of one sample it would pool channels."""
        return kind not in POOLED or len(self._graph.shapes[node.all_input_nodes[0]]) == POOLED[kind] + 2

    def _concatenate(self, node: fx.Node) -> bool:
        given = bind(node, ("tensors", "dim"))
        if isinstance(given["tensors"], fx.Node):  # a list that another operation made, as `chunk` does
            return False
        parts = [self._signals.get(part) for part in given["tensors"]]
        rank, along = len(self._graph.shapes[node]), given.get("dim", 0)
        if not isinstance(along, int) or along % rank != 1 or any(part is None or part.axis != 1 for part in parts):
            return False
        found = [part for part in parts if part is not None]
        units = np.concatenate([part.units for part in found])
        known, value = torch.cat([part.known for part in found]), torch.cat([part.value for part in found])
        self._signals[node] = Signal(units, known, value, node)
        return True

    def _join(self, node: fx.Node, x: Signal, other: fx.Node) -> bool:
        """Two tensors combined channel by channel: each pair of units becomes one."""
        y, shapes = self._signals.get(other), self._graph.shapes
        first, second = shapes[node.all_input_nodes[0]], shapes.get(other, ())
        if y is None or x.axis != y.axis or len(first) != len(second):
            return False
        if first[:2] != second[:2] or first[x.axis] != second[x.axis]:
            return False
        self.units.join(x.units, y.units)
        value = as_function(node.target)(x.value.clone().view(1, -1), y.value.view(1, -1), **node.kwargs).view(-1)
        known = x.known & y.known
        if node.target in PRODUCTS:
            known = known | (x.known & (x.value == 0)) | (y.known & (y.value == 0))
        self._signals[node] = Signal(x.units, known, value, x.storage if in_place(node) else node, x.axis)
        if in_place(node):
            self._forget(x.storage, but=node)
        return True

    def _leave(self, node: fx.Node) -> None:
        """A step that cannot be followed: its input and output units stay, and its inputs may be changed in place."""
        module: Any = self._graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        touched = [found for source in node.all_input_nodes for found in self._held(source)]
        if touched:
            kind = type(module).__name__ if module is not None else getattr(node.target, "__name__", node.target)
            reason = ""
            if module is not None and self._calls[node.target] > 1:
                reason = " is called more than once"
            elif id(module) in self._tied:
                reason = " shares its weights"
            where = node.name if module is None else node.target
            self.notes.append(f"{where} ({kind}){reason}: the channels that it touches are left alone")
        for found in touched:
            self.units.pin(found.units)
            self._forget(found.storage)
        self._fresh(node, touched[0].storage if touched else node)

    def _fresh(self, node: fx.Node, storage: fx.Node) -> None:
        """New pinned units with no known constants."""
        shape = self._graph.shapes.get(node, ())
        if len(shape) >= 2:
            units = self.units.new(shape[1])
            self.units.pin(units)
            self._signals[node] = Signal.without_constants(units, storage)

    def _pin(self, node: fx.Node) -> None:
        for found in self._held(node):
            self.units.pin(found.units)

    def _forget(self, storage: fx.Node, but: fx.Node | None = None) -> None:
        """This memory was changed in place: its signals are no longer known constants."""
        for node, signal in self._signals.items():
            if node is not but and signal.storage is storage:
                signal.known = torch.zeros_like(signal.known)
