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

RECOMPILES = 256  # forms of one network: its modes, shares of a batch, phases held, and rates of dropout


def computed(model: nn.Module, compiled: bool) -> nn.Module:
    """The network that computes, with the same parameters; of a kind that is compiled already, it takes that again.

    Each size of a batch is compiled by itself, so that what a process has seen before changes nothing. A network that
    needs more than RECOMPILES forms is an error: torch would go on without compiling it.
    """
    if not compiled:
        return model
    import torch._dynamo  # takes seconds

    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.accumulated_recompile_limit = 4 * RECOMPILES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return cast(nn.Module, torch.compile(model, dynamic=False))


def of_compiler(error: BaseException) -> bool:
    """Whether an error comes from torch.compile, and not from the network."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


@dataclass(frozen=True)
class Gradients:
    """What a training computes its gradients with; it also learns from the `teacher`'s answers, if there is one."""

    feed: Feed
    settings: Train
    teacher: nn.Module | None
    world: World

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
                total = self.loss(wrapped, images, labels, weights)
                if last:
                    self.world.at(exchange, waits=True)
                # DDP averages gradients over ranks, which may hold unequal shares of the batch; a bad image counts as a
                # sample with loss 0, so the divisor is the same on every rank without another all-reduce.
                (total * (self.world.size / self.settings.batch_size)).backward()
            sums.append(total.detach())
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The sum of the losses of images (uint8), each times its weight; all lie on this rank's device."""
        output = self.feed.forward(network, images, self.settings.precision)
        return (self.feed.task.losses(self.settings, output, labels, self._taught(images)) * weights).sum()

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor | None:
        """The teacher's output for images (uint8) on this rank's device."""
        if self.teacher is None:
            return None
        return self.feed.forward(self.teacher, images, self.settings.precision)
