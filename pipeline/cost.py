"""What a network's layers cost: multiplications on data, the share of activations that are not zero, packed bytes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.errors import UserError
from pipeline.modes import evaluating

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)
DROPOUTS = (nn.modules.dropout._DropoutNd,)
ACTIVATIONS = (
    nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold,
    nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
)  # fmt: skip

Quantity = Literal["weights", "flops", "bytes"]  # what a budget is of


@dataclass(frozen=True)
class Activity:
    """Shares (0..1) of non-zero values, over all samples seen.

    output_density: the paper's Act%, at the place that `measured` names ("after relu1", "own output"); input_density:
    of what the layer reads, so that FLOP% = Weights% * input_density (tables 2 to 5).
    """

    output_density: float
    input_density: float
    measured: str


def layers_by_tensor(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The linear and convolution layers that hold each weight, by the tensor's first name, in definition order."""
    names: dict[int, str] = {}
    found: dict[str, list[nn.Module]] = {}
    for path, layer in module.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, LAYERS) else None
        if weight is not None:
            name = names.setdefault(id(weight), f"{path}.weight" if path else "weight")
            found.setdefault(name, []).append(layer)
    return found


def flops(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Multiplications and additions, 2 a multiply-add, of one sample, by the name of each prunable tensor.

    The paper's counting (tables 2 to 5): 2 * weights * output positions, biases left out. `input_shape` is one
    sample's, (channels, height, width). A layer called several times counts each time, one never called 0. The
    module's modes are put back. Raises UserError where the network does not take such an input.
    """
    layers = layers_by_tensor(module)
    counts = dict.fromkeys(layers, 0)

    def counter(name: str) -> Any:
        def count(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Each output channel of a position takes weights / channels multiply-adds, whatever the groups.
            counts[name] += 2 * layer.weight.numel() * (output.numel() // layer.weight.shape[0])

        return count

    handles = [layer.register_forward_hook(counter(name)) for name, users in layers.items() for layer in users]
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with evaluating(module), torch.no_grad():
            module(torch.zeros((1, *input_shape), dtype=like.dtype, device=like.device))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UserError(
            f"model.factory: the network does not take an input of shape {input_shape} (data.channels, data.size): "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return counts


def packed_bytes(weights: int, kept: int) -> int:
    """Predicted size of a packed tensor: fp32 values, and the smaller of a bitmask and Rice-coded gaps.

    With random positions a gap is geometric with q = 1 - density; Rice's code of width w takes 1 + w bits and
    one more for each 2^w that the gap holds, q^(2^w) / (1 - q^(2^w)) on average.
    """
    if kept == 0:
        return 0

    def bits(width: int) -> float:
        beyond = (1.0 - kept / weights) ** (2**width)
        return 1 + width + beyond / (1.0 - beyond)

    # bits() falls and then rises: its least lies where about half of the gaps need a further bit.
    near = min(18, max(3, round(math.log2(math.log(2) * weights / kept))))
    gaps = min(kept * bits(width) for width in range(near - 2, near + 3)) / 8
    return math.ceil(min(4 * weights, 4 * kept + min(gaps, weights / 8)))


def price(quantity: Quantity, weights: int, flops: int) -> Callable[[int], int]:
    """What a tensor of so many weights, and FLOPs when dense, costs when it keeps some: weights, FLOPs or bytes."""
    if quantity == "flops":
        each = flops // weights
        return lambda kept: each * kept
    if quantity == "bytes":
        return lambda kept: packed_bytes(weights, kept)
    return lambda kept: kept


@dataclass
class _Record:
    """Running counts of one tensor, kept on its device so that no batch waits for them."""

    counts: list[Tensor | int] = field(default_factory=lambda: [0, 0, 0, 0])  # output non-zero, all; input likewise
    measured: str = "never called"


@dataclass(frozen=True)
class _Trail:
    """A tensor on its way out of a layer: whoever consumes it next may be that layer's norm or activation."""

    tensor: weakref.ref[Tensor]  # weak, or every activation of the network would stay in memory
    record: _Record
    nonzero: Tensor | int
    total: int


class ActivationMeter:
    """Measures, in a `with` block, the activations of every batch that `module` runs on.

    `names` are prunable tensors. A layer's output is taken after the norm, activation and dropout modules that directly
    consume it, found by following the tensor itself; a functional activation (F.relu) is not seen, and `measured` then
    says "own output". Dropout passes the trail on but is not measured: its zeros are not the network's. The input of
    the first linear or convolution layer called is the network's own, whose density is set to 1 as in the paper.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._module = module
        self._layers = layers_by_tensor(module)
        unknown = [name for name in names if name not in self._layers]
        assert not unknown, f"not weights of linear or convolution layers: {unknown}"
        self._records = {name: _Record() for name in names}
        self._names = {id(layer): name for name, users in self._layers.items() for layer in users}
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._trails: dict[int, _Trail] = {}
        self._first: str | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> ActivationMeter:
        for part in self._module.modules():
            if id(part) in self._names:
                self._handles.append(part.register_forward_hook(self._after_layer))
            elif isinstance(part, NORMS + ACTIVATIONS + DROPOUTS):
                self._handles.append(part.register_forward_hook(self._after_consumer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._trails.clear()

    def result(self) -> dict[str, Activity]:
        """The densities by tensor name. A layer that was never called has density 0 and says so."""
        found = {}
        for name, record in self._records.items():
            out_nonzero, out_total, in_nonzero, in_total = (int(count) for count in record.counts)
            density = out_nonzero / out_total if out_total else 0.0
            reads = in_nonzero / in_total if in_total else 0.0
            found[name] = Activity(density, 1.0 if name == self._first else reads, record.measured)
        return found

    def _after_layer(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        name = self._names[id(layer)]
        self._first = self._first or name
        record = self._records.get(name)
        if record is None:
            return
        nonzero, total = torch.count_nonzero(output.detach()), output.numel()
        for place, count in enumerate((nonzero, total, torch.count_nonzero(inputs[0].detach()), inputs[0].numel())):
            record.counts[place] = record.counts[place] + count
        record.measured = "own output"
        self._trails[id(output)] = _Trail(weakref.ref(output), record, nonzero, total)

    def _after_consumer(self, part: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        trail = self._trails.get(id(inputs[0]))
        if trail is None or trail.tensor() is not inputs[0]:  # an id can be that of a tensor long gone
            return
        del self._trails[id(inputs[0])]
        nonzero, total, record = trail.nonzero, trail.total, trail.record
        if not isinstance(part, DROPOUTS):
            nonzero, total = torch.count_nonzero(output.detach()), output.numel()
            record.counts[0] = record.counts[0] + nonzero - trail.nonzero
            record.counts[1] = record.counts[1] + total - trail.total
            record.measured = f"after {self._paths[id(part)]}"
        self._trails[id(output)] = _Trail(weakref.ref(output), record, nonzero, total)
