"""A network as a graph of operations (torch.fx), with the shape of every tensor in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 (torch has no public name for it)

from pipeline.base.names import few
from pipeline.network import heads
from pipeline.network.layers import LAYERS
from pipeline.network.logits import forward_of
from pipeline.network.operations import UNFLATTENS, named_sizes

# What tracing raises where the Python code looks into a tensor, or into an input that is no tensor.
UNTRACEABLE = (
    fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError,
    NotImplementedError, AssertionError,
)  # fmt: skip


@dataclass
class Traced:
    """The graph of `module` (which shares the network's own layers), and every tensor's shape, batch first.

    `flattened` names the calls of view and reshape that are now torch.flatten(x, 1). `hard_coded` names those of them
    whose number of features was hard-coded: only this graph, not the network's own code, takes another number.
    """

    module: fx.GraphModule
    shapes: dict[fx.Node, tuple[int, ...]]
    notes: list[str]
    flattened: list[str] = field(default_factory=list)
    hard_coded: list[str] = field(default_factory=list)


class _Tracer(fx.Tracer):
    """A tracer that also takes modules whose code cannot be followed as one step.

    A network is called with its input alone (`one_input`): its other arguments are what they are by default.
    """

    def __init__(self, leaves: Collection[nn.Module], one_input: bool) -> None:
        super().__init__()
        self._whole, self._one_input = {id(leaf) for leaf in leaves}, one_input

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = id(m) in self._whole or type(m) in heads.KINDS
        return whole or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        if not (self._one_input and is_module):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        forward = forward_of(self.root)

        def alone(module: nn.Module, x: Any) -> Any:
            return forward(module, x)

        return super().create_args_for_root(alone, is_module, concrete_args)


class _Shapes(fx.Interpreter):
    """Runs the graph and remembers the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(result.shape)
        return result


def graph_of(model: nn.Module) -> tuple[fx.GraphModule | None, list[str]]:
    """The graph of a network in evaluation mode, and notes on the parts that cannot be followed.

    A part whose code looks into its tensors (a loop over a size, an `if` on a value) becomes one step. Where the code
    of the network's top module does this, there is no graph.
    """
    leaves: list[nn.Module] = []
    notes: list[str] = []
    try:
        return _trace(model, leaves, one_input=True), notes
    except UNTRACEABLE as error:
        top = _first_line(error)
    for name, part in reversed(list(model.named_modules())):
        if name and not part.__module__.startswith("torch.nn"):
            try:
                _trace(part, leaves, one_input=False)
            except UNTRACEABLE as error:
                leaves.append(part)
                notes.append(f"{name} ({type(part).__name__}) is left alone: torch.fx cannot follow its code: "
                             f"{_first_line(error)}")  # fmt: skip
    try:
        return _trace(model, leaves, one_input=True), notes
    except UNTRACEABLE:
        return None, [f"the whole network is left alone: torch.fx cannot follow its code: {top}"]


def traced(model: nn.Module, example: Tensor) -> Traced | list[str]:
    """The graph of `model` and its shapes on `example`, (batch, ...); or the notes that say why there is none.

    The model must be in evaluation mode. A batch of 1 is doubled, to tell the batch axis from others of size 1.
    """
    module, notes = graph_of(model)
    if module is None:
        return notes
    shapes = _Shapes(module)
    try:
        with torch.no_grad():
            shapes.run(example if len(example) > 1 else torch.cat([example, example]))
    except UNTRACEABLE as error:  # torch.fx followed other code than runs
        return [f"the whole network is left alone: its graph by torch.fx does not run: {_first_line(error)}"]
    result = Traced(module, shapes.found, [*notes, *_unused(model, module)])
    _name_flattening(result)
    return result


def flatten_calls(module: fx.GraphModule, names: Collection[str]) -> None:
    """Turn the named calls of view and reshape into torch.flatten(x, 1), and drop the arithmetic on sizes left over."""
    for node in module.graph.nodes:
        if node.name in names:
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (node.args[0], 1), {}
    module.graph.eliminate_dead_code(is_impure_node=_matters)
    module.recompile()


def resize_calls(module: fx.GraphModule, sizes: Mapping[str, Mapping[int, int]]) -> None:
    """Change numbers in the named calls of view, reshape and unflatten: each by its place among the call's sizes."""
    for node in module.graph.nodes:
        if node.name in sizes:
            named = [*named_sizes(node)]
            for place, size in sizes[node.name].items():
                named[place] = size
            node.args = (*node.args[: 2 if node.target in UNFLATTENS else 1], tuple(named))
    module.recompile()


def _trace(model: nn.Module, leaves: Collection[nn.Module], *, one_input: bool) -> fx.GraphModule:
    return fx.GraphModule(model, _Tracer(leaves, one_input).trace(model))


def _unused(model: nn.Module, graph: fx.GraphModule) -> list[str]:
    """A note on the layers that the graph does not call."""
    called = {f"{node.target}." for node in graph.graph.nodes if node.op == "call_module"}
    layers = [name for name, part in model.named_modules() if isinstance(part, LAYERS)]
    unused = [name for name in layers if not any(f"{name}.".startswith(each) for each in called)]
    return [f"never called in evaluation, and so left alone: {few(unused)}"] if unused else []


def _name_flattening(result: Traced) -> None:
    """Find and rewrite the calls of view and reshape that flatten everything after the batch."""
    for node in result.module.graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_method" or node.target not in ("view", "reshape") or source not in result.shapes:
            continue
        before, after = result.shapes[source], result.shapes[node]
        if len(before) > 2 and len(after) == 2 and after[0] == before[0]:
            result.flattened.append(node.name)
            named = named_sizes(node) or next(iter(node.kwargs.values()))
            last = named[-1] if isinstance(named, tuple | list) else None
            if isinstance(last, int) and last != -1:
                result.hard_coded.append(node.name)
    flatten_calls(result.module, result.flattened)


def _matters(node: fx.Node) -> bool:
    """Whether a step must stay even where no step reads it: all steps but reading and multiplying sizes."""
    reads_size = node.op == "call_method" and node.target == "size"
    picks = node.op == "call_function" and node.target in (getattr, operator.getitem, operator.mul)
    return not (reads_size or picks)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


State = Any  # tensors, and plain values, in tuples and lists


def nbytes(state: State) -> int:
    """Bytes of the tensors in a state."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))
