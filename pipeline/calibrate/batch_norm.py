"""Batch norm's running statistics, estimated again: a pruned network's activations are not the dense one's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: PLC2701 (torch has no public name for it)

from pipeline.data.loader import Batch
from pipeline.network.modes import evaluating
from pipeline.task.feed import Feed

Statistics = list[dict[str, Tensor]]  # each norm's buffers by name


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics, in definition order."""
    return [part for part in model.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch], feed: Feed, device: torch.device) -> None:
    """Set every running mean and variance to the plain average over these batches (uint8), all else in eval mode.

    Unreadable images are left out, and so are batches smaller than the first, since their statistics are less exact.
    Ranks that get the same batches compute the same bits. A network without batch norm stays as it is.
    """
    found = norms(model)
    if not found:
        return
    momenta = [norm.momentum for norm in found]
    with evaluating(model):
        for norm in found:
            norm.reset_running_stats()
            norm.momentum = None  # for torch, None means a cumulative average
            norm.training = True
        try:
            size = 0
            for batch in batches:
                size = size or len(batch.images)
                images = batch.images[batch.weights > 0]
                if len(batch.images) == size and len(images) > 1:
                    feed.forward(model, images.to(device, non_blocking=True))
        finally:
            for norm, momentum in zip(found, momenta, strict=True):
                norm.momentum = momentum


def statistics(model: nn.Module) -> Statistics:
    """Copies of the running statistics, for `put_back`."""
    return [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms(model)]


def put_back(model: nn.Module, saved: Statistics) -> None:
    """Set the running statistics to those saved, to the bit."""
    for norm, buffers in zip(norms(model), saved, strict=True):
        for name, buffer in norm.named_buffers(recurse=False):
            buffer.copy_(buffers[name])
