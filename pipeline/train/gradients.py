"""The gradients of one update: forward and backward of a batch, part by part, over all ranks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.loader import Batch
from pipeline.settings.training import Train
from pipeline.task.feed import Feed
from pipeline.train.world import World


def computed(model: nn.Module, compiled: bool) -> nn.Module:
    """The network that computes, with the same parameters; of a kind that is compiled already, it takes that again."""
    return cast(nn.Module, torch.compile(model)) if compiled else model


@dataclass(frozen=True)
class Gradients:
    """What a training computes its gradients with; it also learns from the `teacher`'s answers, if there is one."""

    feed: Feed
    world: World
    settings: Train
    teacher: nn.Module | None

    def of(self, wrapped: nn.Module, batch: Batch, exchange: str) -> Tensor:
        """Compute the gradients of a batch that lies on this rank's device. Returns the sum of this rank's losses.

        `exchange` names the place in which this rank waits for the others.
        """
        given = (batch.images, batch.labels, batch.weights)
        parts = [*zip(*(each.chunk(self.settings.accumulate) for each in given), strict=True)]
        sums = []
        for number, (images, labels, weights) in enumerate(parts, 1):
            last = number == len(parts)
            alone = isinstance(wrapped, DistributedDataParallel) and not last
            with wrapped.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                output = self.feed.forward(wrapped, images, self.settings.precision)
                total = (self.feed.task.losses(self.settings, output, labels, self._taught(images)) * weights).sum()
                if last:
                    self.world.at(exchange, waits=True)
                # DDP averages gradients over ranks, which may hold unequal shares of the batch; a bad image counts as a
                # sample with loss 0, so the divisor is the same on every rank without another all-reduce.
                (total * (self.world.size / self.settings.batch_size)).backward()
            sums.append(total.detach())
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor | None:
        """The teacher's output for images (uint8) on this rank's device."""
        if self.teacher is None:
            return None
        return self.feed.forward(self.teacher, images, self.settings.precision)
