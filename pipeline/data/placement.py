"""Which sample goes where: pure functions of counts, seed and epoch.

An epoch is one line of samples (shards in a drawn order, laid end to end) cut into a fixed number of
equal lanes; within a lane the order is a bounded shift. Step s takes the next `batch_size // lanes`
samples of every lane. Ranks own lanes, so what a step holds never depends on how many ranks there are.
Samples are named by their number within the split, counted over the shards in manifest order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.base.seeding import derive, generator, uniform

Counts = Sequence[int] | NDArray[np.int64]  # samples of each shard


@dataclass(frozen=True)
class Lane:
    """One lane of an epoch: `line` is its samples as stored, `order[p]` the place in `line` of output p."""

    line: NDArray[np.int64]
    order: NDArray[np.int64]

    @property
    def samples(self) -> NDArray[np.int64]:
        """Sample numbers in the order in which the lane gives them out."""
        return self.line[self.order]


class EpochLine:
    """Every sample number of an epoch once: shards in drawn order, each in stored order. Parts of it are made as asked.

    `counts` are the samples of each shard; the memory needed is a few numbers a shard.
    """

    def __init__(self, counts: Counts, seed: int, epoch: int) -> None:
        ends = np.cumsum(counts, dtype=np.int64)
        shards = generator(seed, "shards", epoch).permutation(len(ends))
        lengths = np.diff(ends, prepend=0)[shards]
        self._ends = np.cumsum(lengths)  # for each shard in drawn order: the place in the line after its last sample
        # What is added to a place within the shard to give the number of the sample there.
        self._moved = (ends[shards] - lengths) - (self._ends - lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def part(self, start: int, stop: int) -> NDArray[np.int64]:
        """The sample numbers at places start..stop, shape (stop - start,)."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        first, last = np.searchsorted(self._ends, start, "right"), np.searchsorted(self._ends, stop, "left")
        within = slice(first, last + 1)
        lengths = np.diff(np.clip(self._ends[within], start, stop), prepend=start)
        return np.repeat(self._moved[within], lengths) + np.arange(start, stop)


def lanes(line_length: int, lanes: int) -> list[slice]:
    """Cut a line into `lanes` slices of exactly line_length // lanes; the tail is left out."""
    assert lanes > 0, lanes
    each = line_length // lanes
    return [slice(lane * each, (lane + 1) * each) for lane in range(lanes)]


def bounded_shift(n: int, window: int, stream: int) -> NDArray[np.int64]:
    """An order of n inputs in which none moves by `window` places or more; shape (n,).

    Input i is sorted by i + U(0, window). Whoever reads the inputs in turn and gives them out in this
    order therefore holds fewer than `window` of them.
    """
    assert window >= 1, window
    places = np.arange(n, dtype=np.int64)
    draws = uniform(stream, places, 1)[:, 0]
    return np.argsort(places + draws * window, kind="stable").astype(np.int64)


def owned(rank: int, world: int, lanes: int) -> range:
    """The lanes of one rank: neighbouring ones. Where the division leaves a remainder, the first ranks own one more."""
    assert 0 <= rank < world, (rank, world)
    each, extra = divmod(lanes, world)
    first = rank * each + min(rank, extra)
    return range(first, first + each + (rank < extra))


def resume_point(order: NDArray[np.int64], position: int) -> int:
    """The first input that the outputs from `position` on need; len(order) if none."""
    return int(order[position:].min()) if position < len(order) else len(order)


def steps_per_epoch(n: int, lanes: int, batch_size: int) -> int:
    """Whole steps in n samples: each lane holds n // lanes, a step takes batch_size // lanes from each."""
    assert batch_size % lanes == 0, (batch_size, lanes)
    return (n // lanes) // (batch_size // lanes)


def epoch_lanes(
    counts: Counts, seed: int, epoch: int, *, total: int, window: int, only: Iterable[int] | None = None
) -> list[Lane]:
    """The lanes of an epoch that are in `only` (all of `total` by default), in order."""
    line = EpochLine(counts, seed, epoch)
    cuts = lanes(len(line), total)
    return [
        Lane(
            line.part(cuts[lane].start, cuts[lane].stop),
            bounded_shift(len(line) // total, window, derive(seed, "shift", epoch, lane)),
        )
        for lane in (range(total) if only is None else only)
    ]


def batch_indices(
    counts: Counts, seed: int, epoch: int, step: int, *, lanes: int, batch_size: int, window: int
) -> NDArray[np.int64]:
    """The whole batch of one step over all ranks, shape (batch_size,), lane after lane."""
    micro = batch_size // lanes
    part = slice(step * micro, (step + 1) * micro)
    return np.concatenate([lane.samples[part] for lane in epoch_lanes(counts, seed, epoch, total=lanes, window=window)])


def stratified(labels: NDArray[np.int64], total: int, stream: np.random.Generator) -> NDArray[np.int64]:
    """`total` places of `labels`, sorted, each class in proportion (largest remainder, ties to the lower class)."""
    assert 0 <= total <= len(labels), (total, len(labels))
    members = np.unique(labels, return_counts=True)[1]
    # Exact in integers: share = total * members / n; the remainders of that division are compared, not floats.
    counts, remainders = np.divmod(total * members.astype(np.int64), max(len(labels), 1))
    first = np.argsort(-remainders, kind="stable")[: total - int(counts.sum())]
    counts[first] += 1
    places = np.split(np.argsort(labels, kind="stable"), np.cumsum(members)[:-1])  # of each class, rising
    chosen = [stream.permutation(part)[:count] for part, count in zip(places, counts, strict=False)]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def same_label_neighbours(labels: NDArray[np.int64]) -> float:
    """Share of neighbouring samples with one label: about sum(p^2) if mixed, near 1 if sorted by class."""
    return float(np.mean(labels[1:] == labels[:-1])) if len(labels) > 1 else 0.0
