"""The scan against a straightforward one: a deep copy of the network for each tensor and level, all samples, whole
forward passes, as distiller does it. Same levels, same numbers.

    SECATEUR_DATA=... python benchmarks/bench_scan.py [--images 100] [--race-images 400] [--every 8] [--full]

Two tables. The first compares the time of the same grid of 13 levels, decoding left out on both sides, with the share
of the FLOPs that lie at or after the scanned layer, which is all that must be computed again. The second runs the
adaptive scan with racing on SqueezeNet, and draws 20 other orders of the samples to see how often the intervals hold
the drop that all samples have. Seconds are of this process's own processor time, one thread, so that a busy machine
changes little. The dense network's own answers, one pass for all tensors, are left out of ours and shown apart. By
default a part of the images and of SqueezeNet's tensors; --full takes all, which is hours on two cores. AlexNet has
random weights: its times mean something, its accuracies do not.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

from pipeline.data import decoder, images, sources
from pipeline.data.loader import Batch
from pipeline.network import cost
from pipeline.network.survey import Prunable, survey
from pipeline.network.trace import graph_of
from pipeline.prune.masks import top_mask
from pipeline.scan import racing, suffix
from pipeline.scan.inputs import ScanInputs, shuffled
from pipeline.scan.levels import against, scan_part
from pipeline.settings.config import Config, parse_config
from pipeline.settings.pruning import Scan
from pipeline.task.answers import Answers
from pipeline.task.feed import Feed

CPU = torch.device("cpu")
LEVELS = list(Scan.model_fields["levels"].default)
ADAPTIVE = {"mode": "adaptive", "tolerance": 0.15, "max_levels": 7, "interval": 0.1}
POINTS = [0.6, 0.3, 0.1]  # the levels whose coverage is checked
REPEATS = 20


@dataclass
class Straightforward:
    """What the straightforward scan found: answers by tensor and density, and its seconds."""

    answers: dict[str, dict[float, Answers]]
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100, help="of the first table")
    parser.add_argument("--race-images", type=int, default=400, help="of the second table; 0 leaves it out")
    parser.add_argument("--every", type=int, default=8, help="takes every N-th tensor of SqueezeNet")
    parser.add_argument("--networks", default="alexnet,squeezenet1_1", help="of the first table")
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    if given.full:
        given.images, given.race_images, given.every = 800, 800, 1
    data = os.environ.get("SECATEUR_DATA")
    if not data:
        sys.exit("set SECATEUR_DATA to the folder that holds imagenette-224-subset.tar")
    torch.set_num_threads(1)
    table = Table(title=f"same grid: {len(LEVELS)} levels, {given.images} images, seconds")
    for title in (
        "network",
        "tensors",
        "straightforward",
        "ours",
        "ratio",
        "suffix FLOPs",
        "ratio / share",
        "dense pass",
    ):
        table.add_column(title, justify="right")
    console = Console(width=140)
    config = make_config(data, levels=LEVELS)
    for name in filter(None, given.networks.split(",")):
        model, tensors = make_network(name, data, given.every)
        batches = read(config, given.images)
        inputs = scan_of(config, CPU, model, batches)
        dense, once = timed(inputs.answers)
        found, seconds = same_grid(inputs, tensors, dense)
        share, ratio = suffix_share(model, tensors), seconds / found.seconds
        cells = (f"{found.seconds:.1f}", f"{seconds:.1f}", f"{ratio:.3f}", f"{share:.3f}", f"{ratio / share:.2f}")
        table.add_row(name, str(len(tensors)), *cells, f"{once:.1f}")
    if given.networks:
        console.print(table)
    if given.race_images:
        console.print(race(data, given.race_images, given.every))


def make_config(data: str, **scan: Any) -> Config:
    tree = {
        "name": "bench",
        "data": {
            "source": "folder", "root": f"{data}/imagenette-224-subset.tar", "channels": 3, "size": 224,
            "class_index": f"{data}/imagenet_class_index.json", "eval_batch": 50,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        },
        "scan": scan,
    }  # fmt: skip
    return parse_config(tree)


def read(config: Config, count: int) -> list[Batch]:
    """So many images of Imagenette's val part, of all classes, decoded."""
    part = sources.open_source(config.data, config.seed).test
    numbers = np.linspace(0, len(part.labels) - 1, count).round().astype(np.int64)
    pixels = np.stack([images.fit(decoder.decode(part.read(int(n)), 3), 224) for n in numbers])
    whole = [
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        torch.from_numpy(part.labels[numbers]),
        torch.ones(count),
        torch.arange(count),
    ]
    return [Batch(*parts) for parts in zip(*(t.split(config.data.eval_batch) for t in whole), strict=True)]


def make_network(name: str, data: str, every: int) -> tuple[nn.Module, list[Prunable]]:
    """A network, and its tensors or, of SqueezeNet, every so many of them."""
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)().eval()
    if name == "squeezenet1_1":
        path = Path(data) / "weights/squeezenet1_1_imagenet.pth"
        model.load_state_dict(torch.load(path, weights_only=True))
    return model, survey(model)[0][:: every if name == "squeezenet1_1" else 1]


def same_grid(given: ScanInputs, tensors: list[Prunable], dense: Answers) -> tuple[Straightforward, float]:
    """Both scans, one tensor after the other; exits where a number differs. Returns ours' seconds too."""
    theirs, ours = Straightforward({}, 0.0), 0.0
    for tensor in tensors:
        found, seconds = timed(lambda tensor=tensor: straightforward(given, tensor.name))
        theirs.answers[tensor.name] = found
        theirs.seconds += seconds
        levels, seconds = timed(lambda tensor=tensor: list(scan_part(given, dense, tensor.name)))
        ours += seconds
        for level in levels:
            figures = found[level.density].figures()
            assert (level.top1, level.loss) == (figures.top1, figures.loss), (tensor.name, level, figures)
    return theirs, ours


def scan_of(config: Config, device: torch.device, model: nn.Module, batches: list[Batch]) -> ScanInputs:
    """What a scan with these settings measures levels with."""
    return ScanInputs(config.scan, config.prune, Feed.of(config), device, model, batches)


def straightforward(given: ScanInputs, name: str) -> dict[float, Answers]:
    found = {}
    for density in given.scan.levels:
        copied = copy.deepcopy(given.model)
        weight = dict(copied.named_parameters())[name]
        keep = racing.kept(density, weight.numel())
        alive = torch.ones_like(weight, dtype=torch.bool)
        weight.data.mul_(top_mask(weight.detach().abs(), alive, keep))
        found[density] = replace(given, model=copied).answers()
    return found


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


def suffix_share(model: nn.Module, tensors: list[Prunable]) -> float:
    """The mean share of the FLOPs at or after the tensors' layers."""
    flops = cost.flops(model, (3, 224, 224))
    graph, _ = graph_of(model)
    assert graph is not None
    weights = dict(model.named_parameters())
    shares = []
    for tensor in tensors:
        reached = suffix._reached(model, graph.graph, weights[tensor.name])
        layers = [f"{node.target}.weight" for node in reached if node.op == "call_module"]
        shares.append(sum(flops.get(layer, 0) for layer in layers) / sum(flops.values()))
    return float(np.mean(shares))


def race(data: str, count: int, every: int) -> Table:
    """The adaptive scan with racing: its time against a straightforward grid of 13 levels, and its coverage."""
    model, tensors = make_network("squeezenet1_1", data, every)
    config, adaptive = make_config(data, levels=POINTS), make_config(data, levels=LEVELS, **ADAPTIVE)
    batches = read(config, count)
    mixed = shuffled(batches, count, config.data.eval_batch, seed=0)
    plain, raced = scan_of(config, CPU, model, batches), scan_of(adaptive, CPU, model, mixed)
    dense, once = timed(raced.answers)
    theirs = Straightforward({}, 0.0)
    levels, seconds = [], 0.0
    for tensor in tensors:
        found, spent = timed(lambda name=tensor.name: straightforward(plain, name))
        theirs.answers[tensor.name] = found
        theirs.seconds += spent * len(LEVELS) / len(POINTS)
        made, spent = timed(lambda name=tensor.name: list(scan_part(raced, dense, name)))
        levels += made
        seconds += spent
    widest = max((level.drop_high - level.drop_low) / 2 for level in levels)
    inside, points, samples = coverage(plain.answers(), theirs, adaptive.scan)
    table = Table("", "", title=f"adaptive, racing: SqueezeNet 1.1, {len(tensors)} tensors, {count} images")
    table.add_row("settings", ", ".join(f"{key}={value}" for key, value in ADAPTIVE.items()))
    table.add_row("levels of a tensor, mean", f"{len(levels) / len(tensors):.1f} (the grid has {len(LEVELS)})")
    table.add_row("samples of a level, mean", f"{np.mean([level.samples for level in levels]):.0f}")
    table.add_row("half-width of the drop's interval", f"{widest:.3f} at most")
    times = f"{seconds:.1f} of {theirs.seconds:.1f} straightforward (13 levels, reckoned from {len(POINTS)})"
    table.add_row("seconds", f"{times}: {seconds / theirs.seconds:.3f}; dense pass {once:.1f}")
    table.add_row("inside their interval", f"{inside} of {points} points ({inside / points:.1%}), {REPEATS} orders")
    table.add_row("samples of those points, mean", f"{samples:.0f}")
    return table


def coverage(dense: Answers, theirs: Straightforward, settings: Scan) -> tuple[int, int, float]:
    """How many intervals hold the drop of all samples, over other orders of them: the answers are those measured."""
    count, inside, points, spent = len(dense.right), 0, 0, 0
    looks = racing.looks(count, racing=True)
    z, top1 = racing.critical(len(looks)), dense.figures().top1
    for repeat in range(REPEATS):
        order = np.random.default_rng(repeat).permutation(count)
        before = pick(dense, order)
        for levels in theirs.answers.values():
            for given in levels.values():
                truth = top1 - given.figures().top1
                after = pick(given, order)
                for look in looks:
                    seen = against(after.first(look), before, z)
                    if racing.decided(seen.drop_low, seen.drop_high, top1, settings):
                        break
                inside += seen.drop_low <= truth <= seen.drop_high
                points += 1
                spent += look
    return inside, points, spent / points


def pick(given: Answers, order: Any) -> Answers:
    return Answers(
        right=given.right[order],
        right5=given.right5[order],
        right_present=None,
        loss=given.loss[order],
        valid=given.valid[order],
    )


if __name__ == "__main__":
    main()
