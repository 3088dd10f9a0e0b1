"""The processes that train together, whoever started them: Ray Train, torchrun, or nobody (one process)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.base.errors import Agreed, UserError


@dataclass(frozen=True)
class World:
    """This process's place among those that train together; `World(0, 1, cpu)` needs no process group."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` over all ranks (in place, returned)."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, values: Tensor) -> Tensor:
        """Rank 0's `values` on every rank (in place, returned)."""
        if self.size > 1:
            dist.broadcast(values, 0)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            self.sum(torch.zeros(1, device=self.device))

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank."""
        if self.size == 1:
            assert data is not None
            return data
        length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64, device=self.device)
        dist.broadcast(length, 0)
        if data is not None and self.first:
            buffer = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(self.device)
        else:
            buffer = torch.empty(max(1, int(length)), dtype=torch.uint8, device=self.device)
        dist.broadcast(buffer, 0)
        return buffer.cpu().numpy().tobytes()[: int(length)]

    def same(self, value: int) -> bool:
        """Whether all ranks hold the same integer (63 bits)."""
        if self.size == 1:
            return True
        ends = torch.tensor([value, -value], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return int(ends[0]) == -int(ends[1])

    def agree(self, problem: str | None) -> None:
        """Raise Agreed on every rank if any of them has a problem; the text is the lowest such rank's."""
        if self.size == 1:
            if problem:
                raise Agreed(problem)
            return
        lowest = torch.tensor([self.rank if problem else self.size], dtype=torch.int64, device=self.device)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        speaker = int(lowest)
        if speaker == self.size:
            return
        text = torch.zeros(2000, dtype=torch.uint8, device=self.device)
        if self.rank == speaker and problem:
            raw = problem.encode()[:2000]
            text[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(self.device)
        dist.broadcast(text, speaker)
        raise Agreed(text.cpu().numpy().tobytes().rstrip(b"\0").decode(errors="replace"))


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `device` asks for. Raises UserError when a GPU is asked for and none is there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this process sees no GPU: set device=auto, or cluster.gpus_per_worker=1")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def configure_process(threads: int) -> None:
    """Set what affects the bits of results and would else depend on the launcher (Ray sets OMP_NUM_THREADS)."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def current_world(device: torch.device) -> World:
    """The world of the process group that is up, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


@contextmanager
def torchrun_world(wanted: str) -> Iterator[World]:
    """The world that torchrun's variables describe, or a world of one, on the `wanted` device; closes its group."""
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield World(0, 1, choose_device(wanted))
        return
    device = choose_device(wanted, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ranks wait while rank 0 builds shards, so the limit is long; torchrun ends them if rank 0 dies.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield current_world(device)
    finally:
        dist.destroy_process_group()
