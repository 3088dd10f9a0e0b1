"""Runs again only the part of the network that some weight tensors influence; the rest is computed once a batch.

The answers are the whole forward pass's to the bit: the same operations on the same tensors in the same order. Each way
of cutting the network is tested on some samples, with the tensors pruned, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map  # noqa: PLC2701 (torch has no public name for them)

from pipeline.network.trace import State, graph_of

Weights = Sequence[nn.Parameter]


class Suffix:
    """No cut: runs the whole network. The base of the other ways of cutting.

    `prepare` computes what does not depend on the tensors. `finish` computes the rest with the tensors' present values,
    any number of times. The network is in evaluation mode and gradients are off.
    """

    method = "whole"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prepare(self, inputs: Tensor) -> State:
        """What is shared, for a batch of inputs (n, channels, height, width)."""
        return inputs

    def finish(self, state: State) -> Tensor:
        """The network's output, (n, classes). The state stays as it is."""
        return self.rest(tree_map(_copy, state))  # the network may change what it is given in place

    def rest(self, state: State) -> Tensor:
        """As `finish`, but may change the state's tensors in place."""
        logits: Tensor = self.model(state)
        return logits


class Graph(Suffix):
    """Cut in the torch.fx graph: every step that the tensors' layers do not reach is shared, parallel branches
    included.
    """

    method = "fx"

    def __init__(self, model: nn.Module, graph: fx.Graph, weights: Weights) -> None:
        super().__init__(model)
        after = _reached(model, graph, weights)
        border = [n for n in graph.nodes if n not in after and any(user in after for user in n.users)]
        self.before = fx.GraphModule(model, _before(graph, after, border))
        self.after = fx.GraphModule(model, _after(graph, after, border))
        self.changed: set[int] | None = None  # which of the border's values the rest changes in place

    def prepare(self, inputs: Tensor) -> State:
        return self.before(inputs)

    def finish(self, state: State) -> Tensor:
        if self.changed is None:
            self.changed = self._changes(state)
        return self.rest([tree_map(_copy, v) if i in self.changed else v for i, v in enumerate(state)])

    def rest(self, state: State) -> Tensor:
        logits: Tensor = self.after(*state)
        return logits

    def _changes(self, state: State) -> set[int]:
        """The values whose version counters move. A change through a view moves the counter of its base too."""
        copies = [tree_map(_copy, value) for value in state]
        before = [_versions(value) for value in copies]
        self.rest(copies)
        return {i for i, value in enumerate(copies) if _versions(value) != before[i]}


class Borders(Suffix):
    """Cut between the network's top-level modules, where its own code cannot be followed.

    What modules returned before the first use of any of the tensors cannot depend on them. These outputs are kept,
    and returned again when the network's own code is run again. Code between the modules thus sees the same values.
    """

    method = "borders"

    def __init__(self, model: nn.Module, weights: Weights) -> None:
        super().__init__(model)
        self.children = list(dict.fromkeys(model.children()))
        self.users = [part for part in model.modules() if _among(part._parameters.values(), weights)]

    def prepare(self, inputs: Tensor) -> State:
        returned: list[tuple[int, Any]] = []

        def stop(part: nn.Module, given: Any) -> None:
            raise _Reached

        def keep(number: int) -> Callable[..., None]:
            # A copy, since what runs next may change it in place.
            return lambda part, given, output: returned.append((number, tree_map(_copy, output)))

        handles = [user.register_forward_pre_hook(stop) for user in self.users]
        handles += [child.register_forward_hook(keep(i)) for i, child in enumerate(self.children)]
        try:
            self.model(_copy(inputs))
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return inputs, returned

    def rest(self, state: State) -> Tensor:
        inputs, returned = state
        with _replayed(self.children, iter(returned)):
            logits: Tensor = self.model(inputs)
        return logits


def choose(
    model: nn.Module, weights: Weights, example: Tensor, pruned: Callable[[], AbstractContextManager[None]]
) -> Suffix:
    """The finest cut that gives the whole network's answers on `example`, (n, ...), to the bit.

    In the `pruned()` block the weights are pruned to some level. Gradients must be off.
    """
    graph, _ = graph_of(model)
    ways: list[Callable[[], Suffix]] = [lambda: Borders(model, weights)]
    if graph is not None:
        ways.insert(0, lambda: Graph(model, graph.graph, weights))
    for make in ways:
        found = make()
        if _agrees(found, model, example, pruned):
            return found
    return Suffix(model)


class _Reached(BaseException):  # no Exception, which the network's code might catch
    """Ends a forward pass at the first use of a tensor."""


def _agrees(
    found: Suffix, model: nn.Module, example: Tensor, pruned: Callable[[], AbstractContextManager[None]]
) -> bool:
    state = found.prepare(_copy(example))
    with pruned():
        expected = model(_copy(example))
        return all(torch.equal(found.finish(state), expected) for _ in range(2))


def _reached(model: nn.Module, graph: fx.Graph, weights: Weights) -> set[fx.Node]:
    """The steps that use one of the tensors, or anything that was computed from it."""
    held = {name for name, value in model.named_parameters(remove_duplicate=False) if _among([value], weights)}
    found: set[fx.Node] = set()
    for node in graph.nodes:
        uses = node.op == "get_attr" and node.target in held
        if node.op == "call_module":
            uses = any(name.startswith(f"{node.target}.") for name in held)
        if uses or node.op == "output" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _before(graph: fx.Graph, after: set[fx.Node], border: list[fx.Node]) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node not in after:
            copies[node] = made.node_copy(node, lambda source: copies[source])
    made.output(tuple(copies[node] for node in border))
    return made


def _after(graph: fx.Graph, after: set[fx.Node], border: list[fx.Node]) -> fx.Graph:
    made = fx.Graph()
    copies = {node: made.placeholder(f"border_{i}") for i, node in enumerate(border)}
    for node in graph.nodes:
        if node in after:
            copies[node] = made.node_copy(node, lambda source: copies[source])
    return made


@contextmanager
def _replayed(children: list[nn.Module], returned: Iterator[tuple[int, Any]]) -> Iterator[None]:
    """Let the modules return their kept outputs, in turn; when none are left they compute again."""
    originals = [child.forward for child in children]

    def replay(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = next(returned, None)
            if kept is None:
                return originals[number](*args, **kwargs)
            assert kept[0] == number, "a forward pass took another way than the one before it"
            return kept[1]

        return forward

    shadowed = ["forward" in child.__dict__ for child in children]
    try:
        for number, child in enumerate(children):
            child.forward = replay(number)
        yield
    finally:
        for child, original, was_own in zip(children, originals, shadowed, strict=True):
            if was_own:
                child.forward = original
            else:
                child.__dict__.pop("forward", None)


def _among(held: Iterable[Any], weights: Weights) -> bool:
    return any(value is weight for value in held for weight in weights)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
