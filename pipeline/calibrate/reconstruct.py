"""Reconstruction after a prune, without labels and without retraining.

Layer after layer, in the order of execution, the kept weights and the bias are set so that the layer gives what it gave
before the prune. The inputs are those of the pruned network, whose earlier layers are already reconstructed. So errors
do not add up from layer to layer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline.calibrate import layer_inputs
from pipeline.data.loader import Batch
from pipeline.network import cost
from pipeline.network.layers import layers_by_tensor
from pipeline.network.modes import evaluating
from pipeline.network.trace import graph_of, nbytes
from pipeline.run.records import Fit
from pipeline.task.feed import Feed
from pipeline.train.world import World

HELD_BYTES = 2**30  # the most activations that are kept from layer to layer, on each rank
DAMPING = 0.01  # share of the mean diagonal of X Xᵀ: how strongly survivors are held at their values
TOLERANCE, ITERATIONS = 1e-4, 300  # conjugate gradients stop at this share of the first residual, or this many steps


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    reference: nn.Module,
    masks: Mapping[str, Tensor],
    batches: Sequence[Batch],
    feed: Feed,
    world: World,
) -> tuple[list[Fit], list[str]]:
    """Set the kept weights, and biases, of `model` to the least-squares solution; notes say which could not be set.

    `model` is masked, `reference` is the network before the prune, `batches` are this rank's share. For each output,
    over the rows (samples and positions) of all ranks, min ‖W X + b − W' X' − b'‖² + λ ‖(W', b') − (masked W, b)‖² with
    W' zero where it is pruned; λ is DAMPING times the mean diagonal of X' X'ᵀ. Rank 0 solves it in float64, so all
    ranks hold the same bits. A pruned weight stays 0. Raises AssertionError where torch.fx cannot follow the network
    (`graph_of`).
    """
    fits: list[Fit] = []
    with evaluating(model), evaluating(reference):
        layers, notes = _layers(model, masks, cost.count(model, feed.shape).outside)
        both = _Both(model, reference, batches, feed, world.device)
        for place, target, name in both.order({id(layer): name for name, layer in layers.items()}):
            layer, before = model.get_submodule(target), reference.get_submodule(target)
            sums = _Sums(layer)
            for given, wanted in both.inputs(place):
                sums.add(layer, before, given, wanted, feed.seed)
            fits.append(_solve(name, layer, masks[name], sums, world))
    done = {fit.name for fit in fits}
    notes += [f"{name} is not computed by a step of its own" for name in layers if name not in done]
    return fits, notes


def _layers(
    model: nn.Module, masks: Mapping[str, Tensor], outside: Collection[str]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The layer of each tensor that can be reconstructed, and notes that say why others cannot.

    `outside` names tensors that are used outside of a call of their layer.
    """
    found: dict[str, nn.Module] = {}
    held = layers_by_tensor(model)
    notes = [f"{name} is a weight of attention, not of a layer" for name in masks if name not in held]
    for name, users in held.items():
        if name not in masks:
            continue
        if name in outside:
            notes.append(f"{name} is used outside of a layer of its own (by attention, or by F.linear)")
        elif len(users) > 1:
            notes.append(f"{name} is shared by {len(users)} layers")
        elif not layer_inputs.is_plain(users[0]):
            notes.append(f"{name} belongs to a {type(users[0]).__name__}, which computes in a way of its own")
        elif layer_inputs.gram_bytes(users[0]) > layer_inputs.LARGEST_BYTES:
            notes.append(f"{name} has too many inputs (X Xᵀ takes over {layer_inputs.LARGEST_BYTES / 2**30:g} GiB)")
        else:
            found[name] = users[0]
    return found, notes


class _Sums:
    """Sums for one layer, float64: X' X'ᵀ (groups, n, n); R X'ᵀ (groups, outputs, n); ‖R‖² and ‖Y‖².

    Y are the outputs before the prune, R = Y − masked W X' is the error of the masked layer. n is the number of inputs,
    plus one for a bias. The products are summed with R rather than Y to avoid cancellation: a layer without error stays
    as it is.
    """

    def __init__(self, layer: Any) -> None:
        groups, outputs, count = layer_inputs.matrix(layer, layer.weight).shape
        count += layer.bias is not None
        make: dict[str, Any] = {"dtype": torch.float64, "device": layer.weight.device}
        self.gram = torch.zeros(groups, count, count, **make)
        self.cross = torch.zeros(groups, outputs, count, **make)
        self.powers = torch.zeros(2, **make)

    def add(self, layer: Any, before: Any, given: Tensor, wanted: Tensor, seed: int) -> None:
        """Add a batch: the inputs `given` to the layer, and those `wanted` by the layer `before` the prune."""
        rows = layer_inputs.rows(layer, given, seed)
        outputs = _outputs(before, layer_inputs.rows(before, wanted, seed))
        missed = outputs - _outputs(layer, rows)
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        self.gram += (rows.mT @ rows).double()
        self.cross += (missed.mT @ rows).double()
        self.powers += torch.stack([missed.double().square().sum(), outputs.double().square().sum()])


def _outputs(layer: Any, rows: Tensor) -> Tensor:
    """(groups, rows, outputs of a group)."""
    found = rows @ layer_inputs.matrix(layer, layer.weight).mT
    return found if layer.bias is None else found + layer.bias.view(found.shape[0], 1, -1)


def _solve(name: str, layer: Any, mask: Tensor, sums: _Sums, world: World) -> Fit:
    """Solve for a layer, and set its kept weights and bias."""
    for total in (sums.gram, sums.cross, sums.powers):
        world.sum(total)
    free = layer_inputs.matrix(layer, mask)
    count = free.shape[2]
    if layer.bias is not None:
        free = torch.cat([free, free.new_ones(*free.shape[:2], 1)], 2)
    change = torch.zeros_like(sums.cross)
    if world.first:
        change = least_squares(sums.gram, sums.cross, free)
    change = world.from_first(change.contiguous())
    missed, power = sums.powers.tolist()
    left = missed + float(((change @ sums.gram - 2 * sums.cross) * change).sum())
    moved = layer.weight.double() + change[..., :count].reshape(layer.weight.shape)
    layer.weight.copy_(torch.where(mask, moved.to(layer.weight.dtype), layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() + change[..., count].reshape(-1))
    share = 1 / power if power else 0.0
    return Fit(name, missed * share, max(0.0, left) * share)


def least_squares(gram: Tensor, cross: Tensor, free: Tensor, damping: float = DAMPING) -> Tensor:
    """D that minimises ‖R − D X‖² + λ ‖D‖², from G = X Xᵀ and C = R Xᵀ; D is zero where `free` is False.

    gram is G (groups, n, n), cross is C (groups, outputs, n), free has C's shape; λ = damping * mean diagonal of G.
    Conjugate gradients with the diagonal as preconditioner, all rows at once: one product with G per iteration. They
    start at 0 and only descend, so ‖R − D X‖² is at most ‖R‖², wherever they stop.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    held = (damping * diagonal.mean(1))[:, None, None]
    scale = diagonal[:, None, :] + held
    scale = torch.where(scale > 0, scale, 1.0)
    change = torch.zeros_like(cross)
    residual = cross * free
    direction = residual / scale
    size = (residual * direction).sum(2)
    limit = TOLERANCE**2 * size
    for _ in range(ITERATIONS):
        if bool((size <= limit).all()):
            break
        image = (direction @ gram + held * direction) * free
        along = (direction * image).sum(2)
        step = torch.where(along > 0, size / along, 0.0)[..., None]
        change = change + step * direction
        residual = residual - step * image
        pressed = residual / scale
        before, size = size, (residual * pressed).sum(2)
        direction = pressed + torch.where(before > 0, size / before, 0.0)[..., None] * direction
    return change


class _Both:
    """Two networks of the same code, run side by side, step by step of their graphs, on all batches.

    Intermediate values are held at the last layer where those of all batches, of both networks, fit into HELD_BYTES.
    The steps after it are run anew for each layer.
    """

    def __init__(
        self, model: nn.Module, reference: nn.Module, batches: Sequence[Batch], feed: Feed, device: torch.device
    ) -> None:
        self.steps = [_Steps(model), _Steps(reference)]
        assert len(self.steps[0].nodes) == len(self.steps[1].nodes)
        self.batches, self.feed, self.device = batches, feed, device
        self.held: list[tuple[int, list[_Values]] | None] = [None] * len(batches)

    def order(self, names: Mapping[int, str]) -> Iterator[tuple[int, str, str]]:
        """(place, module, tensor) of each layer in `names` (tensor by id) that is called only once, in call order."""
        steps = self.steps[0]
        calls = [(place, node.target) for place, node in enumerate(steps.nodes) if node.op == "call_module"]
        found = [(place, target, id(steps.modules[target])) for place, target in calls]
        for place, target, number in found:
            if number in names and [other for *_, other in found].count(number) == 1:
                yield place, target, names[number]

    def inputs(self, place: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch, the inputs of the layer called at `place`, in the model and in the reference."""
        keep: bool | None = None
        for number in range(len(self.batches)):
            states = self._at(number, place)
            if keep is None:
                keep = nbytes([list(state.values()) for state in states]) * len(self.batches) <= HELD_BYTES
            if keep:
                self.held[number] = (place, states)
            given, wanted = (steps.argument(place, state) for steps, state in zip(self.steps, states, strict=True))
            yield given, wanted

    def _at(self, number: int, place: int) -> list[_Values]:
        held = self.held[number]
        if held is not None:
            start, states = held
            # Copies, since steps may change their inputs in place. One memo for each state keeps views as views.
            states = [_copied(state) for state in states]
        else:
            batch = self.batches[number]
            images = self.feed.inputs(batch.images[batch.weights > 0].to(self.device))
            start, states = 0, [{steps.first: images.clone()} for steps in self.steps]
        return [steps.run(state, start, place) for steps, state in zip(self.steps, states, strict=True)]


_Values = dict[fx.Node, Any]  # the values of a graph's nodes that later nodes need


class _Steps:
    """A network as the list of its graph's nodes, which can be run from any node to any later one."""

    def __init__(self, model: nn.Module) -> None:
        graph, notes = graph_of(model)
        assert graph is not None, notes
        self.nodes = [*graph.graph.nodes]
        self.modules = dict(model.named_modules())
        self.runner = fx.Interpreter(graph)
        self.numbers = {node: number for number, node in enumerate(self.nodes)}
        self.last = {node: max((self.numbers[user] for user in node.users), default=-1) for node in self.nodes}
        self.first = next(node for node in self.nodes if node.op == "placeholder")

    def run(self, values: _Values, start: int, stop: int) -> _Values:
        """Run the nodes from `start` to before `stop`, and return the values that nodes from `stop` on need.

        `values` are those that nodes from `start` on need; they are changed in place.
        """
        self.runner.env = values
        for number, node in enumerate(self.nodes[start:stop], start):
            if node.op != "placeholder":
                values[node] = self.runner.run_node(node)
            elif node is not self.first:
                values[node] = node.args[0] if node.args else None
            for source in (*node.all_input_nodes, node):
                if self.last[source] <= number:
                    values.pop(source, None)
        return values

    def argument(self, place: int, values: _Values) -> Tensor:
        """The input of the layer called at `place`."""
        [source] = self.nodes[place].all_input_nodes
        given: Tensor = values[source]
        return given


def _copied(values: _Values) -> _Values:
    memo: dict[int, Any] = {}
    return {node: copy.deepcopy(value, memo) for node, value in values.items()}
