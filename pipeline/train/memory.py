"""Too little memory, on a GPU or in a machine: which setting to lower. Trying again would end the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline.base.errors import UserError
from pipeline.settings.training import Train


class OutOfMemory(UserError):
    """A step, or an evaluation, that does not fit into the memory of its device."""


def lacks(error: BaseException) -> bool:
    """Whether an error is a lack of memory: Python's, NumPy's, or torch's on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def said(error: BaseException, remedy: str = "") -> str:
    """What a person is told of a lack of memory; `remedy` is what to lower where that is known."""
    remedy = remedy or "lower batch_size, data.eval_batch, data.cache_bytes or data.size, or add memory"
    return f"not enough memory: {remedy} ({' '.join(str(error).split())[:200]})"


def of_training(name: str, settings: Train) -> str:
    """What to lower, or raise, where a step of the training of this name does not fit."""
    return (
        f"lower {name}.batch_size={settings.batch_size}, of which each worker takes its share, or raise "
        f"{name}.accumulate={settings.accumulate} or cluster.workers; lower data.cache_bytes where it is the machine's "
        "memory"
    )


@contextmanager
def remedied(where: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn a lack of memory in the block into OutOfMemory, which names the place, asked for then, and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks(error):
            raise
        raise OutOfMemory(f"{where()}: {said(error, remedy)}") from error
