"""Removes dead units: neurons, channels and heads that nobody reads, or that always give one number.

Han et al. 2015, section 3.5: a neuron with no input or no output connection is dead, and all its connections go. A
neuron without inputs is not 0 but constant. What it adds to the next layer moves into that layer's bias, exactly.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.network import heads
from pipeline.network.apart import ROUNDING, apart
from pipeline.network.build import FOREIGN
from pipeline.network.follow import Follower
from pipeline.network.heads import FewerHeads
from pipeline.network.layers import ATTENTION, CONVOLUTIONS, LAYERS
from pipeline.network.modes import evaluating
from pipeline.network.operations import BATCH_NORMS, CHANNELWISE
from pipeline.network.signals import Flags, Layer, Units, constant_part
from pipeline.network.trace import Traced, flatten_calls, graph_of, resize_calls, traced
from pipeline.network.weights import load_weights

FORMAT = "secateur compact 1"
FULL = (torch.float32, torch.float64)
COARSE = 5e-2  # what passes for rounding in any other precision
_SIZES = TypeAdapter(dict[str, dict[int, int]])


@dataclass
class Compacted:
    """A smaller network with the same outputs.

    `removed` and `kept_units` count the output units of each linear and convolution layer, and of attention's
    projection, by layer. `notes` says what was left alone and why. `flattened` names the calls of view whose number of
    features was hard-coded, and which are now torch.flatten; `resized` has the new sizes, by place, of other calls
    whose numbers were hard-coded. If there are any, or with `as_graph`, since the code computes with the size of a
    layer, `model` is a torch.fx.GraphModule, else it is of the network's own class.
    """

    model: nn.Module
    removed: dict[str, int]
    kept_units: dict[str, int]
    notes: list[str]
    flattened: list[str] = field(default_factory=list)
    resized: dict[str, dict[int, int]] = field(default_factory=dict)
    as_graph: bool = False

    @property
    def narrowed(self) -> list[str]:
        """Torch's modules for attention that lost heads, and so are of another class."""
        return [name for name, part in self.model.named_modules() if isinstance(part, FewerHeads)]


def compact(model: nn.Module, example: Tensor) -> Compacted:
    """A copy of `model` without its dead units, in evaluation mode; `model` stays as it is.

    Pruned weights must be exactly 0. `example`, (batch, ...), is an input; its values do not matter. The outputs equal
    the model's in evaluation mode, but for rounding; inputs and outputs keep their size. Every layer keeps at least one
    unit. Channels that cannot be followed are left alone, and a note says so. The outputs are compared: where they
    differ after all, nothing is removed, and a note says it.
    """
    work = copy.deepcopy(model).eval()
    graph = traced(work, example)
    if not isinstance(graph, Traced):
        return _whole(work, graph)
    found = Follower(graph)
    alive = settle(found.layers, found.units)
    removed, kept = {}, {}
    for layer in found.layers:
        outputs = alive[found.units.roots(layer.outputs)]
        removed[layer.path], kept[layer.path] = int((~outputs).sum()), int(outputs.sum())
        _cut_layer(layer, alive[found.units.roots(layer.inputs)], outputs)
    for carrier in found.carriers:
        _keep_rows(carrier.module, alive[found.units.roots(carrier.units)], CHANNELWISE)
    for module in (*(layer.module for layer in found.layers), *(carrier.module for carrier in found.carriers)):
        _refit(module)
    numbers = {each.node.name: each.sizes(alive[found.units.roots(each.units)]) for each in found.reshaped}
    resized = {name: changed for name, changed in numbers.items() if changed}
    notes = [*graph.notes, *found.notes]
    resize_calls(graph.module, resized)
    own = not graph.hard_coded and not resized
    if own and _same(model, work, example):
        return Compacted(work, removed, kept, notes)
    if _same(model, graph.module.eval(), example):
        return Compacted(graph.module, removed, kept, notes, graph.hard_coded, resized, as_graph=own)
    whole = copy.deepcopy(model).eval()
    return _whole(whole, [*notes, "nothing is removed: the outputs would be others, so its code was not understood"])


def _whole(model: nn.Module, notes: list[str]) -> Compacted:
    """A network of which nothing is removed."""
    sizes = {name: len(part.weight) for name, part in model.named_modules() if isinstance(part, LAYERS)}
    return Compacted(model, dict.fromkeys(sizes, 0), sizes, notes)


def _same(model: nn.Module, small: nn.Module, example: Tensor) -> bool:
    """Whether two networks' outputs differ by no more than rounding; not where the small one fails."""
    try:
        return apart(model, small, example) <= (ROUNDING if example.dtype in FULL else COARSE)
    except FOREIGN:
        return False


def require_taken(model: nn.Module, example: Tensor) -> None:
    """Raise UserError where a network does not take an input."""
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    except FOREIGN as error:
        raise UserError(
            f"the network does not take an input of shape {tuple(example.shape)} and type {example.dtype}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


def settle(layers: list[Layer], units: Units) -> Flags:
    """Which units stay, by root.

    These are the pinned units and, for each layer, the inputs that its staying outputs read, without constants that can
    be folded. Further units stay, though unread, so that no layer is empty and that all groups of a grouped convolution
    keep equally many channels.
    """
    needed = np.zeros(len(units), dtype=np.bool_)
    needed[units.pinned()] = True
    inputs = [units.roots(layer.inputs) for layer in layers]
    outputs = [units.roots(layer.outputs) for layer in layers]
    depends = [layer.reads & ~layer.fold.view(len(layer.reads), 1, -1) for layer in layers]
    count = -1
    while count != (count := int(needed.sum())):
        for i in reversed(range(len(layers))):
            if not layers[i].depthwise:
                rows = torch.from_numpy(needed[outputs[i]]).view(*depends[i].shape[:2], 1)
                needed[inputs[i][(depends[i] & rows).any(1).flatten().numpy()]] = True
    alive = needed.copy()
    count = -1
    while count != (count := int(alive.sum())):
        for i, layer in enumerate(layers):
            if not alive[outputs[i]].any():
                alive[outputs[i][0]] = True
            if len(layer.reads) > 1 and not layer.depthwise:
                _level(alive, inputs[i].reshape(len(layer.reads), -1))
                _level(alive, outputs[i].reshape(len(layer.reads), -1))
    return alive


def rebuild(model: nn.Module, path: str | Path) -> nn.Module:
    """The compact network in a file that `pipeline.export.export.save_compact` wrote; in evaluation mode.

    `model` is the whole network as its factory makes it, whose layers shrink (in place) to the sizes of the file's
    tensors. Raises UserError for a file that is damaged, is no compact network, or is of another one.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read as a compact network: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"'{path}' holds no compact network (format {metadata.get('format')!r}); give the path of a "
                        "compact.safetensors")  # fmt: skip
    model.eval()
    names = [name for name in metadata["flattened"].split(",") if name]
    sizes = _SIZES.validate_json(metadata.get("resized", "{}"))
    made: nn.Module = model
    if names or sizes or "graph" in metadata:
        graph, notes = graph_of(model)  # of the whole network, whose sizes its code may compute with
        if graph is None:
            raise UserError(f"'{path}' is not of this network: {'; '.join(notes)}")
        flatten_calls(graph, names)
        resize_calls(graph, sizes)
        made = graph
    resize(model, shapes)
    load_weights(made, path)
    return made


def resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give the layers, norms, PReLUs and attention of a network the sizes of the tensors named in `shapes`."""
    for name, part in reversed([*model.named_modules()]):  # attention after the layer that it holds
        attention = type(part) in heads.KINDS
        if not attention and not isinstance(part, (*LAYERS, *BATCH_NORMS, nn.PReLU)):
            continue
        names = heads.PROJECTION if attention else CHANNELWISE
        for held in names:
            shape = shapes.get(f"{name}.{held}" if name else held)
            before: Any = getattr(part, held, None)
            if shape is not None and (before is None or tuple(before.shape) != shape):
                like = before if before is not None else getattr(part, names[0])
                assert isinstance(like, Tensor)
                _put(part, held, like.new_zeros(shape))
        _refit(part)


def _level(alive: Flags, groups: NDArray[np.int64]) -> None:
    """Let every group, (groups, channels of a group), keep as many units as the group that keeps most."""
    most = int(alive[groups].sum(1).max())
    for group in groups:
        missing = most - int(alive[group].sum())
        alive[group[~alive[group]][: max(missing, 0)]] = True


def _cut_layer(layer: Layer, inputs: Flags, outputs: Flags) -> None:
    """Fold the removed inputs into the bias, then keep the rows and columns that stay."""
    module, (weight, bias) = layer.module, layer.names
    groups, rows, columns = layer.reads.shape
    if not layer.depthwise:
        added = constant_part(layer.weight, groups, layer.fold & torch.from_numpy(~inputs), layer.value)
        if layer.bias is not None:
            _put(module, bias, (layer.bias.double() + added.to(layer.bias.device)).to(layer.bias.dtype))
        elif bool(added.any()):
            _put(module, bias, added.to(layer.weight))
        if not inputs.all():
            # Rows read the inputs of their own group only, and every group keeps equally many inputs.
            chosen = torch.from_numpy(inputs.reshape(groups, columns)).to(layer.weight.device)
            parts = [part[:, keep] for part, keep in zip(layer.weight.split(rows), chosen, strict=True)]
            _put(module, weight, torch.cat(parts))
    _keep_rows(module, outputs, layer.names)


def _keep_rows(module: nn.Module, keep: Flags, names: Sequence[str]) -> None:
    """Keep the staying rows of the named tensors, which have a row for each channel."""
    for name in () if keep.all() else names:
        tensor: Any = getattr(module, name, None)
        if tensor is not None:
            _put(module, name, tensor[torch.from_numpy(keep).to(tensor.device)])


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter (one that stays trainable if it was) or a buffer."""
    if name in module._buffers:
        module._buffers[name] = tensor.detach().clone()
        return
    before = module._parameters.get(name)
    trains = before.requires_grad if before is not None else True
    module.register_parameter(name, nn.Parameter(tensor.detach().clone(), requires_grad=trains))


def _refit(module: Any) -> None:
    """Set a layer's size attributes to its tensors' sizes."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = len(module.weight) // (module.out_channels // module.in_channels)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, ATTENTION) and module.in_proj_weight is not None:
        heads.refit(module)
    elif isinstance(module, BATCH_NORMS) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
