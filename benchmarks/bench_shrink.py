"""A step of retraining in the masked network, and in the small one that prune.shrink_between_rounds trains.

    python benchmarks/bench_shrink.py [REPEATS]

A ResNet-20 on images of 32 by 32 pixels and torchvision's ResNet-18 on 64 by 64 lose whole channels, the same share of
each group, until half and a quarter of the FLOPs are left. The steps take turns in one process of one thread; times
are of its processor, so that other processes do not count, medians with the 10th and 90th percentile. "cut" is what a
round pays once, to make the small network and to put it back. "difference" is that of the outputs before the steps, as
a share of the largest one.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.network import cost
from pipeline.network.shrink import shrink
from pipeline.network.survey import survey
from pipeline.prune import channels
from pipeline.prune.masks import Applier
from pipeline.rounds import subject
from pipeline.settings.config import Config, parse_config
from pipeline.settings.training import Train
from pipeline.task.feed import Feed
from pipeline.train import recipe
from pipeline.train.gradients import Gradients
from pipeline.train.world import World, configure_process

THREADS, BATCH, REPEATS = 1, 64, 15
CPU = torch.device("cpu")


class Block(nn.Module):
    """Two convolutions beside a shortcut, as in He et al. 2016, section 4.2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


def resnet_20() -> nn.Module:
    """Three stages of three blocks, 16, 32 and 64 channels wide."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(*pair) for pair in itertools.pairwise(widths)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else REPEATS
    configure_process(THREADS)
    columns = (
        "network", "FLOPs left", "parameters left", "step, masked ms", "10-90%", "step, small ms", "10-90%",
        "times faster", "cut ms", "difference",
    )  # fmt: skip
    table = Table(*columns, title=f"cpu, {THREADS} thread, batch {BATCH}, {repeats} steps of each")
    cases: list[tuple[str, Callable[[], nn.Module], int]] = [
        ("ResNet-20", resnet_20, 32),
        ("ResNet-18", lambda: torchvision.models.resnet18(num_classes=10), 64),
    ]
    for name, build, size in cases:
        for times in (2, 4):
            torch.manual_seed(0)
            table.add_row(name, *compare(build(), size, times, repeats))
    Console(width=150).print(table)


def compare(model: nn.Module, size: int, times: int, repeats: int) -> list[str]:
    """The row of a network that keeps one in `times` of its FLOPs."""
    config = parse_config({
        "name": "bench", "data": {"channels": 3, "size": size, "mean": [0.5], "std": [0.25]},
        "prune": {"pattern": "channels", "allocation": "uniform"}, "target": {"budget": "flops"},
    })  # fmt: skip
    feed = Feed.of(config)
    prunable, _ = survey(model)
    groups = channels.groups_of(model, prunable, feed.zeros(2), config.prune)
    assert groups is not None
    sizes, flops = {tensor.name: tensor.weights for tensor in prunable}, cost.flops(model, feed.shape)
    price = subject.price_of("flops", groups, sizes, flops)
    assert price is not None
    units = channels.scores(groups, {name: model.get_parameter(name).abs() for name in groups.shapes})
    whole = price(groups.sizes)
    keep = channels.plan(config.prune, groups, units, groups.whole, whole // times, price, unit="flops")
    masks = channels.masks(groups, units, groups.whole, keep)
    parameters = dict(model.named_parameters())
    Applier([parameters[name].data for name in masks], [*masks.values()]).clean()
    began = time.process_time()
    small = shrink(model, groups, masks)
    cutting = time.process_time() - began
    images = torch.randn(8, *feed.shape)
    with torch.no_grad():
        wanted = model.eval()(images)
        apart = float((small.model.eval()(images) - wanted).abs().max() / wanted.abs().max())
    steps = [stepping(config, model, masks, size), stepping(config, small.model, small.cut(masks), size)]
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 2):  # the first ones are slower
        for step, seconds in zip(steps, taken, strict=True):
            began = time.process_time()
            step()
            if number > 1:
                seconds.append(1e3 * (time.process_time() - began))
    began = time.process_time()
    model.load_state_dict(small.put_back(model.state_dict()))
    cutting += time.process_time() - began
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (small.model, model)]
    medians = [statistics.median(seconds) for seconds in taken]
    shown = [(f"{median:.1f}", spread(seconds)) for median, seconds in zip(medians, taken, strict=True)]
    return [
        f"{price(keep) / whole:.1%}", f"{counts[0] / counts[1]:.1%}", *shown[0], *shown[1],
        f"{medians[0] / medians[1]:.2f}", f"{1e3 * cutting:.1f}", f"{apart:.1e}",
    ]  # fmt: skip


def stepping(config: Config, model: nn.Module, masks: dict[str, Tensor], size: int) -> Callable[[], None]:
    """Makes one step of retraining on the same batch, as the training loop does."""
    settings = Train.model_validate({"batch_size": BATCH, "lr": 0.001})
    gradients = Gradients(Feed.of(config), settings, None, World(0, 1, CPU))
    optimizer = recipe.make_optimizer(settings, list(model.parameters()))
    parameters = dict(model.named_parameters())
    applier = Applier([parameters[name].data for name in masks], [*masks.values()])
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=source)
    labels = torch.randint(0, 10, (BATCH,), generator=source)
    batch = Batch(images, labels, torch.ones(BATCH), torch.arange(BATCH))
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients.of(model, batch, "a step")
        optimizer.step()
        applier.apply()

    return step


def spread(seconds: list[float]) -> str:
    """The 10th and 90th percentile."""
    tenths = statistics.quantiles(seconds, n=10)
    return f"{tenths[0]:.1f}-{tenths[-1]:.1f}"


if __name__ == "__main__":
    main()
