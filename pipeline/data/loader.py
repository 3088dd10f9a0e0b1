"""Batches of images from shards: the same ones whether they stream or lie in memory, for any number of workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.seeding import derive, generator
from pipeline.data import placement, stream
from pipeline.data.split import Batch, Numbers, Split, open_split
from pipeline.data.stream import Raw
from pipeline.settings.data import Data

__all__ = ["Batch", "EvalLoader", "Split", "TrainLoader", "open_split"]


class TrainLoader:
    """Training batches of one rank: the next batch_size // lanes samples of each lane it owns, lane after lane."""

    def __init__(self, split: Split, config: Data, *, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.split, self.config, self.seed = split, config, seed
        self.micro = batch_size // config.lanes
        self.lanes = placement.owned(rank, world, config.lanes)
        self.steps_per_epoch = placement.steps_per_epoch(len(split), config.lanes, batch_size)
        if world > config.lanes:
            raise UserError(f"{world} workers are more than data.lanes={config.lanes}: raise data.lanes")
        if "crop" in config.augment and "resized-crop" in config.augment:
            raise UserError("data.augment names crop and resized-crop, which exclude each other: leave one out")
        if not self.steps_per_epoch:
            raise UserError(
                f"{split.name} has {len(split)} samples, too few for one step of batch_size={batch_size} in "
                f"data.lanes={config.lanes} lanes: lower batch_size, or add data"
            )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on. Reads nothing before what they need."""
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        split = self.split
        lanes = placement.epoch_lanes(
            split.counts, self.seed, epoch, total=self.config.lanes, window=split.window, only=self.lanes
        )
        samples = [lane.samples for lane in lanes]

        def order() -> Iterator[Numbers]:
            for step in range(start_step, self.steps_per_epoch):
                yield np.concatenate([s[step * self.micro : (step + 1) * self.micro] for s in samples])

        def read() -> Iterator[Raw]:
            readers = [self._read_lane(lane, start_step) for lane in lanes]
            together = stream.side_by_side(readers, self.micro) if split.distant else contextlib.nullcontext(readers)
            with together as ready:
                for _ in range(start_step, self.steps_per_epoch):
                    for reader in ready:
                        for _ in range(self.micro):
                            yield next(reader)

        return split.batches(order(), read, derive(self.seed, "augment", epoch))

    def _read_lane(self, lane: placement.Lane, start_step: int) -> Iterator[Raw]:
        """The stored images of a lane from a step on, without the images of earlier steps and the tail."""
        first, last = start_step * self.micro, self.steps_per_epoch * self.micro
        place = np.empty(len(lane.order), np.int64)
        place[lane.order] = np.arange(len(lane.order))
        begin = placement.resume_point(lane.order, first)
        needed = begin + np.flatnonzero((place[begin:] >= first) & (place[begin:] < last))
        return self.split.read(lane.line[needed], place[needed] - first)


class EvalLoader:
    """Every sample exactly once, in fixed batches of data.eval_batch, which do not depend on the number of ranks.

    With `limit`, only so many samples: chosen by seed, each class in proportion.
    """

    def __init__(self, split: Split, config: Data, limit: int | None = None, seed: int = 0) -> None:
        self.split, self.config = split, config
        self.indices: Numbers = np.arange(len(split), dtype=np.int64)
        if limit is not None and limit < len(split):
            self.indices = placement.stratified(split.labels, limit, generator(seed, "limit", split.name))

    def __len__(self) -> int:
        """Samples, over all ranks."""
        return len(self.indices)

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """The batches of one rank: numbers rank, rank + world, ..."""
        count = self.config.eval_batch
        starts = range(rank * count, len(self.indices), world * count)
        mine = [self.indices[start : start + count] for start in starts]
        numbers = np.concatenate(mine) if mine else np.zeros(0, np.int64)
        return self.split.batches(iter(mine), lambda: self.split.read(numbers), None)
