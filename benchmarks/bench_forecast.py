"""How often the rise of the loss that `plan --budgets` predicts, with its 95% interval, comes true.

    SECATEUR_DATA=... python benchmarks/bench_forecast.py [--runs FOLDER] [--images N] [--markdown]
        [--networks lenet-300-100,lenet-5,squeezenet,efficientnet-lite0]

Each network is scanned (each tensor alone, then all together at the densities of scan.together). For six budgets of
weights the allocation is solved as `plan --budgets` does it, all tensors are pruned to it at once without retraining,
and the loss is measured on the same part of val. A rise beyond that of guessing counts as that of guessing, as in the
table of `plan --budgets`. Between two densities of the scan the forecast has to guess; budgets that are such a density
are marked. LeNet-300-100 is trained for three epochs; the others have their trained weights. What lies in FOLDER is not
measured again, so a command that was stopped goes on. EfficientNet-Lite0 needs the package efficientnet-lite-pytorch
0.1.0, and is left out where it is not installed. By default a part of val (2,000 digits, 100 or 60 photographs):
--images N takes N of each.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline import stages
from pipeline.cli.console import show_tables
from pipeline.cli.display import Display
from pipeline.cli.messages import make_console
from pipeline.local import LocalEngine
from pipeline.results import budgets
from pipeline.results.tables import TextTable
from pipeline.run import state
from pipeline.scan import scan
from pipeline.settings.config import Config, load_config
from pipeline.train.world import World, configure_process

ALONE = World(0, 1, torch.device("cpu"))
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMMON = ["threads=1", "device=cpu", "tracking.enabled=false", "prune.allocation=budget"]
PHOTOGRAPHS = ["data.root={data}/imagenette-224-subset.tar", "data.class_index={data}/imagenet_class_index.json"]
LEVELS = "scan.levels=[0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]"
DENSE = [1.5, 2.0, 3.0, 4.0, 6.0, 8.0]
SPARSE = [3.0, 6.0, 12.0, 24.0, 40.0, 70.0]


class Network(NamedTuple):
    """A network's config, what it is given besides, its compressions, the samples of val, and the package it needs."""

    config: str
    given: list[str]
    compressions: list[float]
    images: int
    package: str | None = None


NETWORKS = {
    "lenet-300-100": Network("lenet-300-100.yaml", ["data.root={data}/mnist", "dense.epochs=3"], SPARSE, 2000),
    "lenet-5": Network(
        "lenet-5-caffe.yaml",
        ["data.root={data}/mnist", "model.checkpoint={data}/weights/lenet5_caffe_mnist.pth"],
        SPARSE,
        2000,
    ),
    "squeezenet": Network(
        "squeezenet-imagenette.yaml",
        [*PHOTOGRAPHS, "model.checkpoint={data}/weights/squeezenet1_1_imagenet.pth", LEVELS],
        DENSE,
        100,
    ),
    "efficientnet-lite0": Network(
        "squeezenet-imagenette.yaml",
        [
            *PHOTOGRAPHS, "model.checkpoint={data}/weights/efficientnet_lite0_imagenet.pth", LEVELS,
            "model.factory=efficientnet_lite_pytorch:EfficientNet.from_name",
            "model.kwargs={model_name: efficientnet-lite0}", "data.mean=[0.498]", "data.std=[0.502]",
        ],
        DENSE,
        60,
        "efficientnet_lite_pytorch",
    ),
}  # fmt: skip


class Seen(NamedTuple):
    """A budget: what was predicted and what was measured, in nats, no more than guessing costs."""

    compression: float
    density: float
    known: bool
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def inside(self) -> bool:
        """Whether the measured rise lies in the predicted interval."""
        return self.low <= self.measured <= self.high


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-forecast"), help="a second call goes on there")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, help="of val, for each network")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args()
    if "SECATEUR_DATA" not in os.environ:
        sys.exit("set SECATEUR_DATA to the folder that holds mnist/, weights/ and imagenette-224-subset.tar")
    rows, count, inside, elsewhere = [], 0, 0, [0, 0]
    with Display(make_console(stderr=True)) as display:
        for name in given.networks.split(","):
            package = NETWORKS[name].package
            if package is not None and importlib.util.find_spec(package) is None:
                display.line(f"{name} is left out: the package {package} is not installed")
                continue
            for seen in measure(name, given.runs.resolve(), given.images, display):
                rows.append(cells(name, seen))
                count, inside = count + 1, inside + seen.inside
                elsewhere = [elsewhere[0] + (not seen.known), elsewhere[1] + (not seen.known and seen.inside)]
    columns = ["network", "budget", "density", "predicted rise", "its 95% interval", "measured rise", "inside"]
    table = TextTable("the rise of the loss (nats) on val, without retraining", columns, rows)
    said = f"inside: {inside} of {count}; between the densities of the scan: {elsewhere[1]} of {elsewhere[0]}"
    if given.markdown:
        print(table.markdown(), said, sep="\n\n")
    else:
        show_tables([table], [said])


def measure(name: str, runs: Path, images: int | None, display: Display) -> list[Seen]:
    """Scan a network, and prune it to each budget."""
    config = make_config(name, runs, images)
    configure_process(config.threads)
    engine = LocalEngine(ALONE)
    with state.open_run(config) as here:
        stages.carry_out(stages.up_to(config, stages.SCAN), stages.Driver(config, engine, here, display))
        options = budgets.solve(config, NETWORKS[name].compressions)
        found = engine.together(config, here, scan.DENSE)([each.solution.keep for each in options.asked])
        return [seen_of(option, each.rise, options, config) for option, each in zip(options.asked, found, strict=True)]


def make_config(name: str, runs: Path, images: int | None) -> Config:
    """The config of a network's run, given the data's place."""
    network = NETWORKS[name]
    samples = images or network.images
    here = [text.replace("{data}", os.environ["SECATEUR_DATA"]) for text in network.given]
    own = [f"name={name}-{samples}", f"runs_dir={runs}", f"scan.samples={samples}"]
    return load_config(CONFIGS / network.config, [*COMMON, *here, *own])


def seen_of(option: budgets.Option, rise: float, options: budgets.Options, config: Config) -> Seen:
    """What was predicted and measured for a budget."""
    density, most = option.kept / sum(options.weights.values()), options.chance
    low, high = option.solution.interval
    return Seen(
        compression=option.compression,
        density=density,
        known=any(abs(math.log(density / at)) < 0.01 for at in config.scan.together),
        predicted=min(option.solution.rise, most),
        low=min(low, most),
        high=min(high, most),
        measured=min(rise, most) if math.isfinite(rise) else most,
    )


def cells(name: str, seen: Seen) -> list[str]:
    """A row of the table."""
    return [
        name,
        f"{seen.compression:g}x",
        f"{100 * seen.density:.1f}%{' (scanned)' if seen.known else ''}",
        f"{seen.predicted:.3g}",
        f"{seen.low:.3g} to {seen.high:.3g}",
        f"{seen.measured:.3g}",
        "yes" if seen.inside else "no",
    ]


if __name__ == "__main__":
    main()
