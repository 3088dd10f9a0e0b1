"""The masked all-reduce on a link of a known speed: two processes, each in a network of its own, over gloo.

    python benchmarks/bench_allreduce.py [GBIT...]

Needs root, `ip` and `tc` (Linux). For each network and density: the seconds of a step with plain DDP and with masks,
what the link carried, and two limits: bytes at density times dense, and the speed-up (c + D) / (c + density * D) that
is left when a step computes for c seconds and exchanges for D. The gradients of both ways are compared to the bit.
Last, masks with exchange_precision=bf16: seconds, bytes, and the largest error of a gradient, as a share of the largest
gradient.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.network.build import build_network
from pipeline.network.survey import survey
from pipeline.settings.config import parse_config
from pipeline.train import allreduce

CASES = (  # network, image side, density
    ("alexnet_caffe", 227, 0.11),
    ("torchvision.models.vgg16", 224, 0.075),
    ("torchvision.models.resnet50", 224, 0.20),
)
BATCH, STEPS = 2, 5
HOSTS = ("10.78.0.1", "10.78.0.2")


def main() -> None:
    speeds = [float(word) for word in sys.argv[1:]] or [1.0, 10.0]
    table = Table(
        "network", "Gbit/s", "step, plain s", "step, masked s", "speed-up", "of its limit", "MB, plain", "MB, masked",
        "bytes / (density x dense)", "step, bf16 s", "MB, bf16", "error, bf16",
    )  # fmt: skip
    for speed in speeds:
        for case in range(len(CASES)):
            with tempfile.TemporaryDirectory() as folder, link(speed) as spaces:
                table.add_row(*row(measured(spaces, case, folder), case, speed))
    Console(width=180).print(table)


@contextmanager
def link(gbit: float) -> Iterator[list[str]]:
    """Two networks joined by a cable that carries so much each way; their names."""
    names = [f"bench{os.getpid()}-{number}" for number in (0, 1)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, HOSTS, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            shape = ("rate", f"{gbit:g}gbit", "burst", "1mb", "latency", "50ms")
            _run("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *shape)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()} (this benchmark needs root, ip and tc)")


def measured(spaces: list[str], case: int, folder: str) -> list[dict[str, float]]:
    """What each rank found."""
    ranks = []
    for rank, space in enumerate(spaces):
        command = ["ip", "netns", "exec", space, sys.executable, __file__, "--rank", str(rank), str(case), folder]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment))
    if any(process.wait() for process in ranks):
        sys.exit("a rank failed")
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]


def row(found: list[dict[str, float]], case: int, speed: float) -> list[str]:
    name, _, _ = CASES[case]
    plain, masked = (max(each[way] for each in found) for way in ("plain", "masked"))
    exchange = max(0.0, plain - found[0]["alone"])
    limit = plain / (plain - exchange + found[0]["density"] * exchange)
    sent = [found[0][f"{way} bytes"] / 1e6 for way in ("plain", "masked")]
    return [
        name.rpartition(".")[2],
        f"{speed:g}",
        f"{plain:.2f}",
        f"{masked:.2f}",
        f"{plain / masked:.2f}",
        f"{plain / masked / limit:.2f}",
        *(f"{each:.1f}" for each in sent),
        f"{sent[1] / (found[0]['density'] * sent[0]):.3f}",
        f"{max(each['bf16'] for each in found):.2f}",
        f"{found[0]['bf16 bytes'] / 1e6:.1f}",
        f"{found[0]['bf16 error']:.4f}",
    ]


def rank_main(rank: int, case: int, folder: str) -> None:
    """One of the two processes: steps without exchange, with plain DDP, and with masks."""
    factory, side, density = CASES[case]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{HOSTS[0]}:29511", rank=rank, world_size=2)
    config = parse_config({"name": "b", "data": {"channels": 3, "size": side}, "model": {"factory": factory}})
    model = build_network(config.model, 1000, 0).eval()  # no dropout, so that both ways see the same network
    generator = torch.Generator().manual_seed(1)
    named = dict(model.named_parameters())
    masks = {
        named[each.name]: torch.rand(named[each.name].shape, generator=generator) < density for each in survey(model)[0]
    }
    for parameter, mask in masks.items():
        parameter.data.mul_(mask)
    images = torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(rank))
    found: dict[str, float] = {"alone": timed(model, model, images)[0]}
    gradients = {}
    ways: dict[str, Callable[[], DistributedDataParallel]] = {
        "plain": lambda: DistributedDataParallel(model),
        "masked": lambda: allreduce.wrapped(model, masks),
        "bf16": lambda: allreduce.wrapped(model, masks, "bf16"),
    }
    for way, wrap in ways.items():
        found[way], found[f"{way} bytes"] = timed(wrap(), model, images)
        gradients[way] = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)  # else the next DDP would find them in the buckets of this one
    travels = sum(int(masks[each].sum()) if each in masks else each.numel() for each in model.parameters())
    found["density"] = travels / sum(each.numel() for each in model.parameters())
    error = largest = 0.0
    for (name, parameter), plain, masked, rounded in zip(model.named_parameters(), *gradients.values(), strict=True):
        wanted = plain * masks[parameter] if parameter in masks else plain
        assert torch.equal(wanted, masked), name
        error = max(error, float((rounded - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    found["bf16 error"] = error / largest
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def timed(called: nn.Module, model: nn.Module, images: torch.Tensor) -> tuple[float, float]:
    """Median seconds of a forward and backward, and the bytes that this network sent in one."""
    seconds, sent = [], []
    for step in range(STEPS + 1):
        model.zero_grad(set_to_none=True)
        dist.barrier()
        before, began = transmitted(), time.perf_counter()
        called(images).square().mean().backward()
        if step:  # the first one makes DDP's buckets
            seconds.append(time.perf_counter() - began)
            sent.append(transmitted() - before)
    return statistics.median(seconds), statistics.median(sent)


def transmitted() -> int:
    """Bytes that left this network so far."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        main()
