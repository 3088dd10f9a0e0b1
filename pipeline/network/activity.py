"""How many activations are not zero: the paper's Act%, measured as batches pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.network.layers import ACTIVATIONS, DROPOUTS, NORMS, layers_by_tensor


@dataclass(frozen=True)
class Activity:
    """Shares (0..1) of non-zero values, over all samples seen.

    output_density: the paper's Act%, at the place that `measured` names ("after relu1", "own output"); input_density:
    of the layer's input, so that FLOP% = Weights% * input_density (tables 2 to 5).
    """

    output_density: float
    input_density: float
    measured: str


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
        """The densities by tensor name. A layer that was never called has density 0, and `measured` says so."""
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
