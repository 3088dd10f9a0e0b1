"""How fast networks are on this device: measured side by side, with spread, and a summary in plain words."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 (torch has no public name for it)
from torch.utils._pytree import tree_leaves  # noqa: PLC2701 (torch has no public name for it)

from pipeline.base.errors import UserError
from pipeline.base.record import Record

LEAST = 5  # timed passes of a network that say something
CLOSE = 1.05  # a ratio nearer to 1 than this is no gain worth naming, however sure

SAME = "no faster"


@dataclass(frozen=True)
class Latency(Record):
    """One network at one batch size: milliseconds a forward pass, and bytes.

    `p10_ms` and `p90_ms` bound the middle 80% of the repeats. `parameter_bytes` is what the network holds (a CSR
    matrix: values and indices); `peak_bytes` the most that a forward pass holds besides: on a CPU the tensors that it
    makes, on a GPU what the allocator gave out, with the libraries' workspaces.
    """

    name: str
    batch: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    parameter_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Passes:
    """How often a network is timed at one batch size: `repeats` after `warmup` others, which are not timed.

    Timing ends after about `seconds`, but never before LEAST repeats. So do the others, but never before the first.
    """

    repeats: int = 100
    warmup: int = 10
    seconds: float = 10.0


USUAL = Passes()


def measure(
    networks: Mapping[str, nn.Module],
    sample_shape: Sequence[int],
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    passes: Passes = USUAL,
    device: str | torch.device = "cpu",
) -> list[Latency]:
    """Time every network on the same random inputs, (batch, *sample_shape) in float32.

    The networks are brought to `device` and into evaluation mode, and stay so. Repeats are interleaved, each in another
    order, so that other load on the machine affects all networks alike. torch's number of threads is restored. Raises
    UserError where the device is not there.
    """
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: this machine has no usable GPU; measure with device=cpu")
    assert passes.repeats >= 1
    models = {name: network.to(where).eval() for name, network in networks.items()}
    found = []
    with with_threads(threads), torch.inference_mode():
        for batch in batches:
            inputs = torch.randn(batch, *sample_shape, generator=torch.Generator().manual_seed(batch)).to(where)
            times = _interleaved(models, inputs, passes)
            for name, model in models.items():
                low, middle, high = np.percentile(times[name], [10, 50, 90]).tolist()
                found.append(Latency(name, batch, middle, low, high, parameter_bytes(model), peak_bytes(model, inputs)))
    return found


def verdict(latencies: Sequence[Latency], where: str = "this device", reference: str = "dense") -> str:
    """The measurements in a sentence: how each network compares with the `reference`, batch by batch.

    A network is faster, or slower, only where the two middle 80% do not overlap and the medians differ by 5%.
    """
    said: dict[str, list[str]] = {}
    any_faster = False
    for batch in dict.fromkeys(row.batch for row in latencies):
        rows = {row.name: row for row in latencies if row.batch == batch}
        for name, row in rows.items():
            if name != reference:
                words = _compared(row, rows[reference])
                any_faster = any_faster or (words != SAME and words.endswith("faster"))
                said.setdefault(name, []).append(f"{words} at batch {batch}")
    text = "; ".join(f"{name} is {', '.join(words)}" for name, words in said.items())
    return text if any_faster else f"no faster on {where}: {text}"


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each once; a CSR matrix counts its values and both index arrays."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        parts = [tensor]
        if tensor.layout is torch.sparse_csr:
            parts = [tensor.values(), tensor.col_indices(), tensor.crow_indices()]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def peak_bytes(model: nn.Module, inputs: Tensor) -> int:
    """The most bytes that a forward pass holds at once beyond the parameters and the input (see Latency)."""
    if inputs.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(inputs.device)
        before = torch.cuda.memory_allocated(inputs.device)
        model(inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(inputs.device) - before
    kept = {_key(part) for part in (inputs, *model.parameters(), *model.buffers()) if part.layout is torch.strided}
    with _Live(kept) as live:
        model(inputs)
    return live.peak


class _Live(TorchDispatchMode):
    """Adds up the memory of the tensors that operations make, as long as these live."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self._known = known
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and _key(tensor) not in self._known:
                storage = tensor.untyped_storage()
                self._live[_key(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _interleaved(models: Mapping[str, nn.Module], inputs: Tensor, passes: Passes) -> dict[str, list[float]]:
    """Milliseconds of every repeat, by network."""
    names = list(models)
    started = time.perf_counter()
    for number in range(passes.warmup):
        if number and time.perf_counter() - started > passes.seconds:
            break
        for model in models.values():
            model(inputs)
    clock = _cuda_ms if inputs.is_cuda else _cpu_ms
    times: dict[str, list[float]] = {name: [] for name in names}
    draw = random.Random(0)
    started = time.perf_counter()
    for repeat in range(passes.repeats):
        if repeat >= LEAST and time.perf_counter() - started > passes.seconds:
            break
        for name in draw.sample(names, len(names)):  # a fixed order would let one always follow the same other
            times[name].append(clock(models[name], inputs))
    return times


def _cpu_ms(model: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    start = time.perf_counter_ns()
    model(inputs)
    return (time.perf_counter_ns() - start) / 1e6


def _cuda_ms(model: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    model(inputs)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _compared(row: Latency, reference: Latency) -> str:
    ratio = reference.median_ms / row.median_ms
    if row.p90_ms < reference.p10_ms and ratio >= CLOSE:
        return f"{ratio:.1f}x faster" if ratio >= 1.095 else f"{ratio - 1:.0%} faster"
    if row.p10_ms > reference.p90_ms and ratio <= 1 / CLOSE:
        return f"{1 / ratio:.1f}x slower" if 1 / ratio >= 1.095 else f"{1 / ratio - 1:.0%} slower"
    return SAME


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """torch has so many threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
