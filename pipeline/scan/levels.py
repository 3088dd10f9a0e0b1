"""The sensitivity scan: each tensor pruned alone at several densities, on val, without retraining (figure 6).

Batches are outside and levels inside: what a level cannot change is computed once (`suffix`), and a level that is
decided sees no more batches (`racing`). Every level is compared, sample by sample, with the dense network's answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.base.seeding import generator
from pipeline.base.stats import paired_mean, tango, wilson
from pipeline.data.loader import Batch
from pipeline.network.trace import nbytes
from pipeline.scan import racing, suffix
from pipeline.scan.one_tensor import OneTensor
from pipeline.settings.config import Config
from pipeline.task.classification import forward, inputs, judge

CHUNK_BYTES = 2**28  # of shared states held at a time; a tensor is masked anew for each level and chunk
PROBE = 2  # samples on which a cut is tried


@dataclass(frozen=True)
class Level:
    """The network with one tensor at one density, against the network as it was (dense), on the same samples.

    `density` is kept / alive, `absolute` kept / weights; they differ only after a round. quality = threshold / std of
    the tensor (paper section 3). `drop` is top1 of the dense network minus this one's on the `samples` measured,
    `rise` the loss of this one minus the dense network's (nats), each with its paired 95% interval (null from one
    sample alone). `top1` and `loss` are the dense network's on all samples, less the drop and plus the rise: where all
    samples were measured, what was measured. low and high are top1's own interval (Wilson), not paired.
    """

    density: float
    kept: int
    absolute: float
    quality: float
    samples: int
    top1: float
    low: float
    high: float
    drop: float
    drop_low: float
    drop_high: float
    loss: float
    rise: float
    rise_low: float | None
    rise_high: float | None
    method: str


@dataclass(frozen=True)
class Answers:
    """How each sample was answered, in the order of the batches: arrays of shape (samples,), loss in nats."""

    right: NDArray[np.bool_]
    loss: NDArray[np.float64]
    valid: NDArray[np.bool_]

    def figures(self, z: float = racing.Z95) -> dict[str, float]:
        """top1, its interval (low, high), loss and the number of readable samples."""
        right, count = int((self.right & self.valid).sum()), int(self.valid.sum())
        low, high = wilson(right, count, z)
        loss = math.fsum(self.loss[self.valid]) / count  # exactly rounded: the order of the samples does not matter
        return {"top1": right / count, "loss": loss, "low": low, "high": high, "samples": count}

    def first(self, count: int) -> Answers:
        """The answers to the first `count` samples."""
        return Answers(self.right[:count], self.loss[:count], self.valid[:count])


@torch.no_grad()
def answers_of(model: nn.Module, batches: Iterable[Batch], config: Config, device: torch.device) -> Answers:
    """The answers of the network as it is, in eval mode, to all batches."""
    model.eval()
    rows = [judge(forward(model, batch.images.to(device), config), batch, None).cpu() for batch in batches]
    return _as_answers(rows)


def scan_tensor(
    model: nn.Module,
    name: str,
    known: Sequence[dict[str, Any]],
    batches: Sequence[Batch],
    dense: Answers,
    config: Config,
    device: torch.device,
    alive: Mapping[str, Tensor] | None = None,
    calibration: Sequence[Batch] = (),
    statistics: Mapping[str, Tensor] | None = None,
) -> Generator[Level]:
    """Yield the levels of one tensor that are missing from those known; in between the network is as it was.

    `dense` are the network's answers to the same batches. `alive` are the masks that stay applied, by name; by default
    every weight is alive. At each level batch norm's statistics are those of the `calibration` batches, if there are
    any; `statistics` are what the criterion needs. With racing the batches must be in an order by chance, and end at
    the looks (`shuffled`).
    """
    model.eval()
    masked = None if alive is None else alive.get(name)
    tensor = OneTensor(model, name, config, device, masked, calibration, statistics)
    prefixes: _Prefixes | None = None
    levels = list(known)
    while wanted := racing.next_levels(levels, config.scan, tensor.count):
        tensor.plan(wanted)
        if prefixes is None:
            prefixes = _Prefixes(tensor, batches, config, device)
        for level in _measure(tensor, prefixes, dense, config):
            levels.append(asdict(level))
            yield level


class _Prefixes:
    """What the levels share of each batch, in chunks of CHUNK_BYTES; the first of them kept for levels added later."""

    def __init__(self, tensor: OneTensor, batches: Sequence[Batch], config: Config, device: torch.device) -> None:
        self.tensor, self.batches, self.config, self.device = tensor, batches, config, device
        self.ends = np.cumsum([len(batch.labels) for batch in batches])
        self.kept: dict[int, Any] | None = {} if config.scan.mode == "adaptive" else None
        self.kept_bytes = 0
        with torch.no_grad(), tensor.shared():
            example = self._inputs(0)[:PROBE]
            self.suffix = suffix.choose(tensor.model, tensor.weight, example, tensor.at_first_level)

    def chunks(self, start: int, stop: int) -> Iterator[list[tuple[Batch, Any]]]:
        """The batches that hold samples start to stop, with their states."""
        chunk: list[tuple[Batch, Any]] = []
        held = 0
        for number in np.flatnonzero((self.ends > start) & (self.ends <= stop)).tolist():
            state = self._state(number)
            chunk.append((self.batches[number], state))
            held += nbytes(state)
            if held >= CHUNK_BYTES:
                yield chunk
                chunk, held = [], 0
        if chunk:
            yield chunk

    def _state(self, number: int) -> Any:
        if self.kept is not None and number in self.kept:
            return self.kept[number]
        with self.tensor.shared():
            state = self.suffix.prepare(self._inputs(number))
        size = nbytes(state)
        if self.kept is not None and self.kept_bytes + size <= CHUNK_BYTES:
            self.kept[number] = state
            self.kept_bytes += size
        return state

    def _inputs(self, number: int) -> Tensor:
        return inputs(self.batches[number].images.to(self.device, non_blocking=True), self.config)


@torch.no_grad()
def _measure(tensor: OneTensor, prefixes: _Prefixes, dense: Answers, config: Config) -> list[Level]:
    """The planned levels, in turn, each on as many samples as it takes."""
    looks = racing.looks(len(dense.right), config.scan.interval is not None)
    z, whole = racing.critical(len(looks)), dense.figures()
    rows: list[list[Tensor]] = [[] for _ in tensor.densities]
    found: dict[int, Level] = {}
    for start, look in itertools.pairwise([0, *looks]):
        for chunk in prefixes.chunks(start, look):
            with tensor.pruned([i for i in range(len(rows)) if i not in found]) as turns:
                for i in turns:
                    rows[i] += [judge(prefixes.suffix.finish(s).float(), batch, None).cpu() for batch, s in chunk]
        for i in [i for i in range(len(rows)) if i not in found]:
            given = _as_answers(rows[i])
            seen = against(given, dense, z)
            if look == looks[-1] or racing.decided(seen["drop_low"], seen["drop_high"], whole["top1"], config.scan):
                found[i] = Level(
                    density=tensor.densities[i],
                    kept=tensor.keeps[i],
                    absolute=tensor.keeps[i] / tensor.dense.numel(),
                    quality=tensor.quality(i),
                    samples=int(given.valid.sum()),
                    method=prefixes.suffix.method,
                    **seen,
                )
        if len(found) == len(rows):
            break
    return [found[i] for i in range(len(rows))]


def against(given: Answers, dense: Answers, z: float) -> dict[str, Any]:
    """The figures of a Level that compare it with the dense network, on the samples given."""
    return {**_drop(given, dense, z), **_rise(given, dense, z), **_figures(given, dense, z)}


def _drop(given: Answers, dense: Answers, z: float) -> dict[str, Any]:
    """The paired drop in top1 on the samples given, and its interval; z is the normal quantile of its confidence."""
    before, after = dense.right[: len(given.right)][given.valid], given.right[given.valid]
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    low, high = tango(lost, won, len(after), z)
    return {"drop": (lost - won) / len(after), "drop_low": low, "drop_high": high}


def _rise(given: Answers, dense: Answers, z: float) -> dict[str, Any]:
    """The paired rise of the loss and its interval, which one sample alone does not have."""
    differences = given.loss[given.valid] - dense.loss[: len(given.loss)][given.valid]
    low, high = paired_mean(differences, z)
    bounds = (low, high) if math.isfinite(low) else (None, None)
    return {"rise": math.fsum(differences) / len(differences), "rise_low": bounds[0], "rise_high": bounds[1]}


def _figures(given: Answers, dense: Answers, z: float) -> dict[str, Any]:
    """top1, low, high and loss: as measured on all samples, or put on the dense network's figures on all samples."""
    if len(given.right) == len(dense.right):
        figures = given.figures(z)
        return {key: figures[key] for key in ("top1", "low", "high", "loss")}
    whole, part, beside = dense.figures(), given.figures(), dense.first(len(given.right)).figures()
    top1 = min(1.0, max(0.0, whole["top1"] - (beside["top1"] - part["top1"])))
    low, high = wilson(top1 * part["samples"], int(part["samples"]), z)
    return {"top1": top1, "low": low, "high": high, "loss": whole["loss"] + part["loss"] - beside["loss"]}


def _as_answers(rows: list[Tensor]) -> Answers:
    """The answers in rows of `judge`, batch after batch."""
    table = torch.cat(rows, 1).numpy()
    return Answers(table[0] > 0, table[3], table[4] > 0)


def shuffled(batches: Iterable[Batch], samples: int, batch_size: int, seed: int) -> list[Batch]:
    """All samples in an order by chance, the same for a seed, in batches of at most batch_size that end at the looks.

    Classes lie together in some data: without this the first samples would not stand for all.
    """
    order = generator(seed, "scan", "order").permutation(samples)
    place = torch.empty(samples, dtype=torch.int64)
    place[torch.from_numpy(order)] = torch.arange(samples)
    parts: list[Tensor] | None = None
    first = 0
    for batch in batches:
        given = (batch.images, batch.labels, batch.weights, batch.indices)
        if parts is None:
            parts = [tensor.new_empty((samples, *tensor.shape[1:])) for tensor in given]
        for part, tensor in zip(parts, given, strict=True):
            part[place[first : first + len(tensor)]] = tensor
        first += len(batch.labels)
    assert first == samples
    assert parts is not None
    cuts = [0, *racing.looks(samples, racing=True)]
    sizes = [
        min(batch_size, end - start)
        for begin, end in itertools.pairwise(cuts)
        for start in range(begin, end, batch_size)
    ]
    return [Batch(*made) for made in zip(*(part.split(sizes) for part in parts), strict=True)]
