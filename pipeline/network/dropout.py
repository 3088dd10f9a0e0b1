"""Dropout at retraining: fewer connections need less of it (Han et al. 2015, section 3.2, equations 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import fx, nn

from pipeline.network.layers import DROPOUTS, LAYERS, layers_by_tensor
from pipeline.network.trace import graph_of


def rates(model: nn.Module) -> dict[str, float]:
    """The rate of every dropout module, by its path."""
    return {path: float(part.p) for path, part in model.named_modules() if isinstance(part, DROPOUTS)}


def owners(model: nn.Module) -> dict[str, list[str]]:
    """The weights whose connections count for each dropout module, by its path; empty where none are found.

    These are the weights of the layer whose outputs the dropout acts on. The paper counts C_i = N_i * N_(i-1), the
    connections into the neurons N_i that dropout acts on. They are found by following the graph backwards from the
    dropout, through activations, norms, pooling and flatten; where several layers' outputs meet (a sum, a
    concatenation), or the module is called several times, all these layers count together. A dropout on the network's
    input, or in a part whose code torch.fx cannot follow, has none; F.dropout in a network's code is no module and is
    not seen.
    """
    found: dict[str, list[str]] = {path: [] for path in rates(model)}
    graph, _ = graph_of(model)
    if graph is None:
        return found
    names = {id(layer): name for name, layers in layers_by_tensor(model).items() for layer in layers}
    paths = {id(part): path for path, part in model.named_modules() if isinstance(part, DROPOUTS)}
    for node in graph.graph.nodes:
        part = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if id(part) in paths:
            feeding = [names[id(layer)] for layer in _layers_before(node, graph)]
            found[paths[id(part)]] = [*dict.fromkeys([*found[paths[id(part)]], *feeding])]
    return found


def corrected_rates(model: nn.Module, keep: Mapping[str, int]) -> dict[str, float]:
    """D_r = D_o * sqrt(C_ir / C_io) for each dropout; a dropout that belongs to no pruned layer keeps its rate.

    `keep` counts what the prunable tensors keep; the model's own rates are D_o, the dense network's.
    """
    sizes = {name: weight.numel() for name, weight in model.named_parameters(remove_duplicate=False)}
    before, dense = owners(model), rates(model)
    found = {}
    for path, names in before.items():
        left = sum(keep.get(name, sizes[name]) for name in names)
        total = sum(sizes[name] for name in names)
        found[path] = dense[path] * math.sqrt(left / total) if names else dense[path]
    return found


@contextmanager
def use(model: nn.Module, given: Mapping[str, float]) -> Iterator[None]:
    """Set these dropout rates, by path, within the block. The model's own rates come back after it: rounds do not
    compound.
    """
    before = rates(model)
    _set(model, given)
    try:
        yield
    finally:
        _set(model, before)


def _set(model: nn.Module, given: Mapping[str, float]) -> None:
    for path, part in model.named_modules():
        if path in given and isinstance(part, DROPOUTS):
            part.p = given[path]


def _layers_before(node: fx.Node, graph: fx.GraphModule) -> list[nn.Module]:
    """The last linear or convolution layer before a step, on every path that leads to it."""
    layers: list[nn.Module] = []
    seen, todo = set(), [*node.all_input_nodes]
    while todo:
        step = todo.pop()
        if step in seen:
            continue
        seen.add(step)
        part = graph.get_submodule(str(step.target)) if step.op == "call_module" else None
        if isinstance(part, LAYERS):
            layers.append(part)
        else:
            todo += step.all_input_nodes
    return layers
