"""Masked all-reduce: two real processes over gloo give what plain DDP with masked gradients gives, with fewer bytes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.train import allreduce

STEPS = 5


def network(channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).double()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def masks_of(model: nn.Module, density: float) -> dict[nn.Parameter, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {p: torch.rand(p.shape, generator=generator) < density for p in model.parameters() if p.ndim > 1}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def train(rank: int, port: int, folder: str, density: float, channels_last: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in ("plain", "masked"):
        model = network(channels_last)
        wrapped = DistributedDataParallel(model)
        masks = masks_of(model, density)
        state = allreduce.use_masks(wrapped, masks) if name == "masked" else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(10 + rank)
        for _ in range(STEPS):
            images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            wrapped(images).square().mean().backward()
            for parameter, mask in masks.items():
                assert parameter.grad is not None
                if name == "plain":
                    parameter.grad.mul_(mask)
                else:
                    assert not parameter.grad[~mask].any() or density > allreduce.WORTH_IT
            optimizer.step()
        counts = (state.sent, state.dense) if state else None
        torch.save({"weights": model.state_dict(), "counts": counts}, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("channels_last", [False, True])
def test_masked_equals_plain_with_masked_gradients(tmp_path: Path, channels_last: bool) -> None:
    mp.spawn(train, (free_port(), str(tmp_path), 0.1, channels_last), nprocs=2)
    saved = {p.stem: torch.load(p, weights_only=True) for p in tmp_path.glob("*.pt")}
    plain, masked = saved["plain-0"]["weights"], saved["masked-0"]["weights"]
    assert all(torch.equal(plain[name], masked[name]) for name in plain)
    assert all(torch.equal(masked[name], saved["masked-1"]["weights"][name]) for name in masked)
    sent, dense = saved["masked-0"]["counts"]
    model = network(False)
    assert dense == sum(p.numel() for p in model.parameters())
    assert sent == sum(int(m.sum()) for m in masks_of(model, 0.1).values()) + 8 + 10  # biases travel whole


def exchange(rank: int, port: int, folder: str, density: float) -> None:
    """One gradient in each precision."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    found = {}
    for precision in ("fp32", "bf16"):
        model = network(False).float()
        made = allreduce.wrapped(model, masks_of(model, density), precision)
        made(images).square().mean().backward()
        found[precision] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_gradients_that_travel_as_bf16_are_rounded_to_8_bits_and_the_same_on_all_ranks(
    tmp_path: Path, density: float
) -> None:
    mp.spawn(exchange, (free_port(), str(tmp_path), density), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first["bf16"], second["bf16"])
    assert not torch.equal(first["bf16"], first["fp32"])
    # Two roundings to 8 bits before the sum and one after it, of numbers that may cancel.
    torch.testing.assert_close(first["bf16"], first["fp32"], rtol=2**-6, atol=2**-7 * float(first["fp32"].abs().max()))


def test_dense_masks_take_the_dense_way() -> None:
    model = network(False)
    assert allreduce.use_masks(None, masks_of(model, 0.9)) is None  # type: ignore[arg-type]
    assert allreduce.use_masks(None, {}) is None  # type: ignore[arg-type]
