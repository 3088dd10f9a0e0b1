"""Our retraining step on a GPU against a plain, well-tuned loop with the same settings: images a second.

    SECATEUR_DATA=... python benchmarks/bench_gpu.py [--networks alexnet,vgg16,resnet50,efficientnet-lite0]
        [--batch 256] [--steps 60] [--device cpu]

Runs alone, without Ray. Ours is a whole training: masks held, losses summed, gradients checked, the batches in their
exact order; only checkpoints are left out. The plain loop is what one writes by hand: a fused SGD, one batch that lies
on the GPU already, no checks. First from memory (the images lie decoded in the machine's memory), then each switch by
itself, then from JPEG shards, with the share of the time in which steps wait for data. Rates are those of the second
epoch, when everything is warm. --device cpu tries the program on a machine without a GPU; such numbers say nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from bench_images import read
from rich.console import Console
from rich.table import Table
from torch import nn

from pipeline.data import shards
from pipeline.network.build import build_network
from pipeline.network.survey import survey
from pipeline.run.events import unheard
from pipeline.run.state import Run
from pipeline.settings.config import Config, parse_config
from pipeline.train.loop import Training
from pipeline.train.session import Session, open_session
from pipeline.train.world import World, choose_device, configure_process

NETWORKS = {  # factory, side of its input, package that it needs, density
    "alexnet": ("torchvision.models.alexnet", 224, "torchvision", 0.11),
    "vgg16": ("torchvision.models.vgg16", 224, "torchvision", 0.075),
    "resnet50": ("torchvision.models.resnet50", 224, "torchvision", 0.20),
    "efficientnet-lite0": (
        "efficientnet_lite_pytorch:EfficientNet.from_name", 224, "efficientnet_lite_pytorch", 0.20,
    ),
}  # fmt: skip
LANES = 8
FAST = {"reproducible": False, "retrain.precision": "bf16", "retrain.channels_last": True}
# What is changed from FAST, one at a time.
SWITCHES = {
    "reproducible": {"reproducible": True},
    "fp32": {"retrain.precision": "fp32"},
    "channels first": {"retrain.channels_last": False},
    "compile": {"compile": True},
    "accumulate=4": {"retrain.accumulate": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    if given.batch % LANES or given.batch * given.steps < 32:
        parser.error(f"--batch must be a multiple of {LANES}, and --batch times --steps at least 32")
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this process sees no GPU: nothing is measured")
    console = Console(width=150)
    console.print(f"torch {torch.__version__}, {gpu(given.device)}, {os.cpu_count()} cores, batch {given.batch}")
    with tempfile.TemporaryDirectory() as folder:
        make_shards(folder, given.batch, given.steps)
        for name in given.networks.split(","):
            factory, _, package, _ = NETWORKS[name]
            if importlib.util.find_spec(package) is None:
                console.print(f"{name}: {package} is not installed, left out ({factory})")
            else:
                console.print(measured(name, folder, given))


def gpu(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "no GPU"


def make_shards(root: str, batch: int, steps: int) -> None:
    """JPEGs of 500 x 375, real ones where there are some, enough for an epoch of so many steps."""
    where = Path(os.environ.get("SECATEUR_DATA", ""), "imagenet-sample-125.tar")
    files = read(where) if where.is_file() else made_up(125)
    from webdataset import ShardWriter

    for split, count in (("train", batch * steps), ("test", 64)):
        with ShardWriter(f"{root}/{split}-%05d.tar", maxcount=1000, verbose=0) as writer:
            for number in range(count):
                data = files[number % len(files)]
                writer.write({"__key__": f"{number:07d}", "jpg": data, "cls": number % 10})
    shards.index(root, val_fraction=max(0.005, 8 / (batch * steps)), num_classes=1000)


def made_up(count: int) -> list[bytes]:
    """Smooth noise, which takes about as long to decode as a photograph."""
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = random.integers(0, 256, (47, 63, 3)).astype(np.float32)
        fine = np.kron(coarse, np.ones((8, 8, 1), np.float32))[:375, :500] + random.normal(0, 12, (375, 500, 3))
        found.append(simplejpeg.encode_jpeg(np.ascontiguousarray(fine.clip(0, 255).astype(np.uint8)), 90))
    return found


def config_of(name: str, root: str, given: argparse.Namespace, changes: dict[str, Any], memory: bool) -> Config:
    factory, size, _, _ = NETWORKS[name]
    data: dict[str, Any] = {
        "source": "shards", "root": root, "channels": 3, "resize": 256, "size": size, "lanes": LANES,
        "decode_threads": os.cpu_count() or 1, "cache_bytes": 2**40 if memory else 0, "mean": [0.5], "std": [0.25],
        "augment": ["flip"] if memory else ["resized-crop", "flip"],
    }  # fmt: skip
    tree: dict[str, Any] = {
        "name": "gpu", "device": given.device, "data": data, "model": {"factory": factory},
        "retrain": {
            "epochs": 2, "batch_size": given.batch, "lr": 0.001, "checkpoint_minutes": 0, "checkpoint_steps": 10**9,
        },
    }  # fmt: skip
    if name == "efficientnet-lite0":
        tree["model"]["kwargs"] = {"model_name": "efficientnet-lite0"}
    for setting, value in {**FAST, **changes}.items():
        *parents, leaf = setting.split(".")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
        part[leaf] = value
    return parse_config(tree)


def measured(name: str, root: str, given: argparse.Namespace) -> Table:
    """The table of a network."""
    table = Table("", "images/s", "x plain loop", "waiting for data", "memory GB", title=name)
    plain = by_hand(config_of(name, root, given, {}, memory=True), given)
    table.add_row("plain loop, one batch on the device", f"{plain:.0f}", "1.00", "", "")

    def row(title: str, changes: dict[str, Any], masked: bool = True, memory: bool = True) -> None:
        rate, waiting, peak = ours(config_of(name, root, given, changes, memory), name, masked)
        table.add_row(title, f"{rate:.0f}", f"{rate / plain:.2f}", f"{waiting:.0%}", f"{peak:.1f}")

    row("ours, dense", {}, masked=False)
    row("ours, masked", {})
    for title, changes in SWITCHES.items():
        row(f"ours, masked, {title}", changes)
    row("ours, masked, from JPEG shards", {}, memory=False)
    return table


def ours(config: Config, name: str, masked: bool) -> tuple[float, float, float]:
    """Images a second of the second epoch, the share of it that waited for data, and the peak of the GPU's memory."""
    configure_process(config.threads, config.reproducible)
    device = choose_device(config.device)
    with tempfile.TemporaryDirectory() as folder:
        session: Session = open_session(config, World(0, 1, device), Run(folder, 0), unheard)
        model = session.new_model()
        named, density = dict(model.named_parameters()), NETWORKS[name][3]
        kept = {
            each.name: torch.rand(named[each.name].shape, device=device) < (density if masked else 2.0)
            for each in survey(model)[0]
        }
        gc.collect()  # what the row before has left
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        training = Training(session, model, config.retrain, "gpu", "gpu", list(kept), kept if masked else None)
        last = training.fit().history[-1]
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return last.images_per_s or 0.0, last.waiting or 0.0, peak


def by_hand(config: Config, given: argparse.Namespace) -> float:
    """Images a second of a loop that does nothing but train."""
    configure_process(config.threads, config.reproducible)
    device, size = choose_device(config.device), config.data.size
    model: nn.Module = build_network(config.model, 1000, 0).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    images = torch.randn(given.batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (given.batch,), device=device)
    began = 0.0
    for step in range(2 * given.steps):
        if step == given.steps:
            wait(device)
            began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    wait(device)
    return given.batch * given.steps / (time.perf_counter() - began)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
