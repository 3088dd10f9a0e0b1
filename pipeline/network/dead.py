"""Dead neurons in masks: a unit without inputs loses its outputs, one without outputs its inputs (section 3.5)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.network.compact import settle
from pipeline.network.follow import Follower
from pipeline.network.signals import Flags, Layer, constant_part
from pipeline.network.trace import Traced, traced


@torch.no_grad()
def remove(
    model: nn.Module, masks: Mapping[str, Tensor], example: Tensor, min_weights: int
) -> tuple[dict[str, Tensor], list[str]]:
    """The masks without the connections of dead units, and notes that say why nothing could be followed.

    A unit without input is constant. Its contribution to the next layer moves into that layer's bias in `model`, so the
    masked network's outputs in evaluation mode stay the same but for rounding. As in compaction, a constant stays where
    zero padding would change it at the border. If the next layer has no bias, the contribution is lost; retraining (or
    prune.bn_samples) makes up for it. A kept weight that happens to be 0 is a connection. A tensor that would fall
    below `min_weights` is left alone. `model` need not be masked. `example` is an input, (batch, ...); its values do
    not matter.
    """
    work = copy.deepcopy(model).eval()
    parameters = dict(work.named_parameters())
    left = {name: mask.clone() for name, mask in masks.items()}
    changed = True
    while changed:
        changed = False
        for name, mask in left.items():
            weight = parameters[name].data
            weight[mask & (weight == 0)] = torch.finfo(weight.dtype).tiny
            weight[~mask] = 0
        graph = traced(work, example)
        if not isinstance(graph, Traced):
            return dict(masks), graph
        found = Follower(graph)
        alive = settle(found.layers, found.units)
        for layer in found.layers:
            name = layer.tensors[0]
            if name in left:
                inputs = alive[found.units.roots(layer.inputs)]
                connected = _connected(layer, inputs, alive[found.units.roots(layer.outputs)]).to(left[name].device)
                fewer = left[name] & connected
                if left[name].sum() > fewer.sum() >= min_weights:
                    left[name], changed = fewer, True
                    _fold(layer, inputs)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(parameters[name])
    return left, []


@torch.no_grad()
def silence(model: nn.Module, example: Tensor) -> tuple[int, list[str]]:
    """Set to 0 the bias of each unit that nothing reads, which changes no output; pruned weights must be exactly 0.

    Returns how many there were, and notes that say why the network cannot be followed. `example` is as for `remove`.
    """
    graph = traced(copy.deepcopy(model).eval(), example)
    if not isinstance(graph, Traced):
        return 0, graph
    found = Follower(graph)
    wanted = settle(found.layers, found.units)  # what is pinned, and what its layers need
    for layer in found.layers:
        if not layer.depthwise:
            wanted[found.units.roots(layer.inputs)[layer.reads.any(1).flatten().numpy()]] = True
    silenced = 0
    for layer in found.layers:
        if layer.bias is not None:
            bias = model.get_parameter(layer.tensors[1])
            unread = torch.from_numpy(~wanted[found.units.roots(layer.outputs)]).to(bias.device)
            silenced += int((unread & (bias != 0)).sum())
            bias.masked_fill_(unread, 0.0)
    return silenced, []


def _connected(layer: Layer, inputs: Flags, outputs: Flags) -> Tensor:
    """Which entries of a layer's weight join two living units; bool, broadcastable to the weight."""
    groups, rows, columns = layer.reads.shape
    joined = torch.from_numpy(outputs).view(groups, rows, 1)
    if not layer.depthwise:
        joined = joined & torch.from_numpy(inputs).view(groups, 1, columns)
    return joined.reshape(groups * rows, -1, *[1] * (layer.weight.ndim - 2))


def _fold(layer: Layer, inputs: Flags) -> None:
    """Move the contribution of dead, constant inputs into the layer's bias, where it has one."""
    bias = layer.bias
    if bias is not None:
        added = constant_part(layer.weight, len(layer.reads), layer.fold & torch.from_numpy(~inputs), layer.value)
        bias.data.copy_(bias.double() + added.to(bias.device))
