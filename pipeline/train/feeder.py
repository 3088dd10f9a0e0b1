"""Batches on their way to the device: copied there while the step before computes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.data import stream
from pipeline.data.loader import Batch

_AHEAD = 2  # batches that lie on the device, or on their way there, before they are asked for


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches with images, labels and weights on `device`; `indices` stay on the host.

    For a GPU a thread copies them, from pinned memory and on a CUDA stream of its own. Closing it ends the thread.
    """
    if device.type != "cuda":
        return batches
    return _arrived(stream.prefetch(_sent(batches, device), _AHEAD))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of this process for copies: torch's allocator keeps memory for each."""
    return torch.cuda.Stream(device)


def _sent(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, torch.cuda.Event]]:
    torch.cuda.set_device(device)  # of this thread, which would else begin on GPU 0, and take memory there
    own = _stream(device)

    def copied(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)

    for batch in batches:
        with torch.cuda.stream(own):
            sent = replace(
                batch, images=copied(batch.images), labels=copied(batch.labels), weights=copied(batch.weights)
            )
        yield sent, own.record_event()


def _arrived(sent: Iterator[tuple[Batch, torch.cuda.Event]]) -> Iterator[Batch]:
    for batch, copied in sent:
        here = torch.cuda.current_stream(batch.images.device)
        here.wait_event(copied)  # on the device: this thread goes on at once
        for tensor in (batch.images, batch.labels, batch.weights):
            tensor.record_stream(here)  # their memory is not given away while this stream may read it
        yield batch
