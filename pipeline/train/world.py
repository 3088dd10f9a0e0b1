"""The processes that train together, whoever started them: Ray Train, torchrun, or nobody (one process)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store  # noqa: PLC2701 (test_roll.py names it)

from pipeline.base.errors import Agreed, RunStopped, UserError
from pipeline.train import roll
from pipeline.train.roll import Roll

POLL_S = 0.1  # between two looks of a rank that waits for what rank 0 has to do next


@dataclass(frozen=True)
class World:
    """This process's place among those that train together; `World(0, 1, cpu)` needs no process group.

    `roll` is where it notes how far it is, for ranks that wait for one that hangs.
    """

    rank: int
    size: int
    device: torch.device
    roll: Roll | None = field(default=None, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0

    def at(self, place: str, waits: bool = False) -> None:
        """Note where this rank is, and whether it waits there for the others; costs no communication."""
        if self.roll is not None:
            self.roll.at(place, waits)

    @contextmanager
    def waiting(self, place: str) -> Iterator[None]:
        """While the block lasts this rank waits for the others, at `place`."""
        self.at(place, waits=True)
        yield
        self.at(f"what comes after {place}")

    def seed(self, seed: int) -> None:
        """Seed what is drawn on the CPU and on this rank's device, as `torch.manual_seed` does.

        That one also seeds the kinds of device that nothing here uses, which takes a quarter of a small network's step.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum of `values` over all ranks (in place, returned)."""
        if self.size > 1:
            with self.waiting("a sum over all ranks"):
                dist.all_reduce(values)
        return values

    def from_first(self, values: Tensor) -> Tensor:
        """Rank 0's `values` on every rank (in place, returned)."""
        if self.size > 1:
            with self.waiting("what rank 0 sends"):
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
        self.from_first(length)
        if data is not None and self.first:
            buffer = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(self.device)
        else:
            buffer = torch.empty(max(1, int(length)), dtype=torch.uint8, device=self.device)
        self.from_first(buffer)
        return buffer.cpu().numpy().tobytes()[: int(length)]

    def same(self, value: int) -> bool:
        """Whether all ranks hold the same integer (63 bits)."""
        if self.size == 1:
            return True
        ends = torch.tensor([value, -value], dtype=torch.int64, device=self.device)
        with self.waiting("a comparison of all ranks"):
            dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        return int(ends[0]) == -int(ends[1])

    def agree(self, problem: str | None) -> None:
        """Raise Agreed on every rank if any of them has a problem; the text is the lowest such rank's."""
        if self.size == 1:
            if problem:
                raise Agreed(problem)
            return
        lowest = torch.tensor([self.rank if problem else self.size], dtype=torch.int64, device=self.device)
        with self.waiting("the question whether all ranks are well"):
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


def configure_process(threads: int, reproducible: bool = True) -> None:
    """Set what affects the bits of results and would else depend on the launcher (Ray sets OMP_NUM_THREADS)."""
    torch.set_num_threads(threads)
    # use_deterministic_algorithms would import torch._inductor: 3 s
    torch.set_deterministic_debug_mode("warn" if reproducible else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # else written twice
    torch.backends.cudnn.benchmark = not reproducible
    torch.backends.cuda.matmul.allow_tf32 = not reproducible
    torch.backends.cudnn.allow_tf32 = not reproducible


@contextmanager
def configured(threads: int, reproducible: bool = True) -> Iterator[None]:
    """As `configure_process` while the block lasts; what it sets, and torch's random state, are then as before."""
    held, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            configure_process(threads, reproducible)
            yield
    finally:
        torch.set_num_threads(held)
        torch.set_deterministic_debug_mode(mode)
        cudnn.benchmark, matmul.allow_tf32, cudnn.allow_tf32 = before
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def current_world(device: torch.device) -> World:
    """The world of the process group that is up, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), device)
    return World(0, 1, device)


def collective_timeout(hang_seconds: float) -> timedelta:
    """How long torch itself lets ranks wait for each other: longer than it takes to find which one hangs."""
    return timedelta(seconds=round(max(600.0, 4 * hang_seconds)))


@contextmanager
def watched(world: World, name: str, seconds: float, found: Callable[[str], None]) -> Iterator[World]:
    """The world of a work called `name`: while the block lasts its ranks look for one that hangs for `seconds`.

    `found` is then called, in a thread, with what a person is told; it must end this process, for nothing else gets a
    rank out of its waiting. Names of works are unique in a process group.
    """
    store = dist.PrefixStore(f"secateur/{name}", _get_default_store()) if world.size > 1 else None
    with roll.called(store, world.rank, world.size, seconds, found) as notes:
        yield replace(world, roll=notes)


def lost_touch(error: Exception) -> bool:
    """Whether an error says that another rank, or the network to it, is gone, and not that this rank did wrong."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


class Posts:
    """What rank 0 tells the other ranks between works, in their order. Waiting for it has no limit, and costs little.

    Works are unlike it: a rank that waits in one longer than cluster.hang_seconds looks for the rank that hangs.
    """

    def __init__(self, world: World) -> None:
        self.world, self.number = world, 0

    def send(self, data: bytes) -> None:
        """On rank 0: tell it."""
        if self.world.size > 1:
            _get_default_store().set(self._key(), data.decode())
        self.number += 1

    def wait(self) -> bytes:
        """On another rank: what rank 0 told, once it has. Raises RunStopped when rank 0 is gone."""
        key = self._key()
        try:
            while not _get_default_store().check([key]):
                time.sleep(POLL_S)
            told: bytes = _get_default_store().get(key)
        except RuntimeError as error:
            raise RunStopped("rank 0 is gone, so this rank has nothing more to do") from error
        self.number += 1
        return told

    def _key(self) -> str:
        return f"secateur/post/{self.number}"


@contextmanager
def torchrun_world(wanted: str, hang_seconds: float) -> Iterator[World]:
    """The world that torchrun's variables describe, or a world of one, on the `wanted` device; closes its group.

    Raises RunStopped where another rank was lost.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield World(0, 1, choose_device(wanted))
        return
    device = choose_device(wanted, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=collective_timeout(hang_seconds))
    try:
        yield current_world(device)
    except RuntimeError as error:
        if not lost_touch(error):
            raise
        raise RunStopped(
            "another rank was lost, and this one cannot go on without it: torchrun says which one; it starts the ranks "
            "again with --max-restarts, and the same command goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()
