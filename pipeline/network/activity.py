"""How many activations are not zero: the paper's Act%, measured as batches pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.network.layers import ACTIVATIONS, NORMS, weights_by_tensor
from pipeline.network.operators import Operators, Product, key, watching

aten = torch.ops.aten

# Activations end the way out of a layer: what they give is what the next layer sees.
_ACTIVATIONS = {
    aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_, aten.leaky_relu, aten.leaky_relu_, aten.elu, aten.elu_,
    aten.gelu, aten.gelu_, aten.silu, aten.silu_, aten.mish, aten.mish_, aten.hardswish, aten.hardswish_,
    aten.hardsigmoid, aten.hardsigmoid_, aten.sigmoid, aten.sigmoid_, aten.log_sigmoid_forward, aten.tanh, aten.tanh_,
    aten.softplus, aten.threshold, aten.threshold_, aten.softshrink, aten.hardshrink, aten._prelu_kernel,
    aten.clamp, aten.clamp_, aten.clamp_min, aten.clamp_min_, aten.rrelu_with_noise, aten.rrelu_with_noise_,
}  # fmt: skip

_NORMS = {
    aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update, aten._batch_norm_no_update, aten.cudnn_batch_norm, aten.miopen_batch_norm,
    aten.native_layer_norm, aten.native_group_norm, aten._fused_rms_norm,
}  # fmt: skip

_SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}

# The values go on as they are, or some as zeros that are not the network's own.
_COPIES = {aten.clone, aten._to_copy, aten.contiguous, aten.native_dropout}


@dataclass(frozen=True)
class Activity:
    """Shares (0..1) of non-zero values, over all samples seen.

    output_density: the paper's Act%, at the place that `measured` names ("after relu1", "after relu()" for a function,
    "own output"); input_density: of what the weight is multiplied by, so that FLOP% = Weights% * input_density (tables
    2 to 5). Both are None where `measured` is "not measured": the weight is used, but by no product of its own.
    """

    output_density: float | None
    input_density: float | None
    measured: str


@dataclass
class _Record:
    """Running counts of one tensor, kept on its device so that no batch waits for them."""

    counts: list[Tensor | int] = field(default_factory=lambda: [0, 0, 0, 0])  # output non-zero, all; input likewise
    measured: str | None = None


@dataclass
class _Trail:
    """What a layer gave, on its way to the norm and the activation after it."""

    storage: StorageWeakRef  # weak, or every activation of the network would stay in memory
    record: _Record
    nonzero: Tensor
    total: int

    def measure(self, found: Tensor, measured: str | None = None) -> None:
        """Count `found` in place of what was counted of this output before, where it is as large."""
        if found.numel() == self.total:
            nonzero = torch.count_nonzero(found.detach())
            self.record.counts[0] = self.record.counts[0] + nonzero - self.nonzero
            self.record.measured = measured or self.record.measured
            self.nonzero = nonzero


class ActivationMeter:
    """Measures, in a `with` block, the activations of every batch that `module` runs on.

    `names` are prunable tensors. What a product by a tensor gives is followed by its memory, whoever computes it: to
    the first activation (a module or a function), through norms, sums, copies and dropout. Another product, pooling or
    the end of the network ends it before. Dropout is passed but not measured: its zeros are not the network's. The
    input of the first product by a weight is the network's own, whose density is set to 1 as in the paper.
    """

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._module = module
        weights = weights_by_tensor(module)
        unknown = [name for name in names if name not in weights]
        assert not unknown, f"not weights of linear or convolution layers: {unknown}"
        self._meter = _Meter(weights, names, {id(part): path for path, part in module.named_modules()})
        self._entered = ExitStack()

    def __enter__(self) -> ActivationMeter:
        self._entered.enter_context(watching(self._module, self._meter))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()
        self._meter.trails.clear()

    def result(self) -> dict[str, Activity]:
        """The densities by tensor name. One that nothing read has density 0, and `measured` says "never called"."""
        found = {}
        for name, record in self._meter.records.items():
            if record.measured is None and name in self._meter.read:
                found[name] = Activity(None, None, "not measured")
                continue
            out_nonzero, out_total, in_nonzero, in_total = (int(count) for count in record.counts)
            density = out_nonzero / out_total if out_total else 0.0
            reads = 1.0 if name == self._meter.first else in_nonzero / in_total if in_total else 0.0
            found[name] = Activity(density, reads, record.measured or "never called")
        return found


class _Meter(Operators):
    """Counts at each product by a weight, and follows what it gives."""

    def __init__(self, weights: dict[str, Tensor], names: list[str], paths: dict[int, str]) -> None:
        super().__init__(weights)
        self.records = {name: _Record() for name in names}
        self.trails: dict[int, list[_Trail]] = {}
        self.first: str | None = None
        self._paths = paths

    def on_product(self, product: Product) -> None:
        for factor in product.factors:
            self.trails.pop(key(factor), None)
        if product.name is None:
            return
        self.first = self.first or product.name
        record = self.records.get(product.name)
        if record is None:
            return
        others = [factor for factor in product.factors if not any(factor is held for held in product.weights)]
        nonzero, total = torch.count_nonzero(product.result), product.result.numel()
        read = (torch.count_nonzero(others[0]), others[0].numel()) if others else (0, 0)
        for place, count in enumerate((nonzero, total, *read)):
            record.counts[place] = record.counts[place] + count
        record.measured = "own output"
        storage = StorageWeakRef(product.result.untyped_storage())
        self.trails[key(product.result)] = [_Trail(storage, record, nonzero, total)]

    def on_other(self, packet: Any, tensors: Sequence[Tensor], result: Any) -> None:
        given = list(dict.fromkeys(place for place in map(key, tensors) if place in self.trails))
        result = result[0] if isinstance(result, tuple | list) and result else result
        ends, norms, sums = packet in _ACTIVATIONS, packet in _NORMS, packet in _SUMS
        if not given or not isinstance(result, Tensor) or not (ends or norms or sums or packet in _COPIES):
            return
        trails = [trail for place in given for trail in self.trails.pop(place)]
        # A bias may be added by a step of its own: the sum is then the layer's own output.
        biased = sums and all(tensor.numel() < result.numel() for tensor in tensors if key(tensor) not in given)
        for trail in trails:
            if ends or norms:
                trail.measure(result, self._where(packet))
            elif biased:
                trail.measure(result)
        if not ends:
            storage = StorageWeakRef(result.untyped_storage())
            self.trails[key(result)] = [_Trail(storage, each.record, each.nonzero, each.total) for each in trails]

    def _where(self, packet: Any) -> str:
        """Where an operator stands: in a norm or activation module, or in the network's own code."""
        part = self.inside[-1] if self.inside else None
        if part is not None and isinstance(part, NORMS + ACTIVATIONS):
            return f"after {self._paths[id(part)]}"
        name = str(packet.__name__).strip("_").removeprefix("native_")
        return f"after {name}()"
