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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port, str(tmp_path), 0.1, channels_last), nprocs=2)
    saved = {p.stem: torch.load(p, weights_only=True) for p in tmp_path.glob("*.pt")}
    plain, masked = saved["plain-0"]["weights"], saved["masked-0"]["weights"]
    assert all(torch.equal(plain[name], masked[name]) for name in plain)
    assert all(torch.equal(masked[name], saved["masked-1"]["weights"][name]) for name in masked)
    sent, dense = saved["masked-0"]["counts"]
    model = network(False)
    assert dense == sum(p.numel() for p in model.parameters())
    assert sent == sum(int(m.sum()) for m in masks_of(model, 0.1).values()) + 8 + 10  # biases travel whole


def test_dense_masks_take_the_dense_way() -> None:
    model = network(False)
    assert allreduce.use_masks(None, masks_of(model, 0.9)) is None  # type: ignore[arg-type]
    assert allreduce.use_masks(None, {}) is None  # type: ignore[arg-type]
