"""What a step checkpoint costs beside the steps between two of them: is it worth doing in the background?

    python benchmarks/bench_checkpoint.py [FOLDER or s3://bucket/prefix]

A checkpoint holds weights, SGD's momentum and the masks of a network pruned to a tenth; it is hashed, written and
synced to the disk. A step is one update on this device with the batch given. Medians of 5; share is that of a training
that saves every 500 steps, as by default.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from pipeline import storage
from pipeline.network.build import build_network
from pipeline.network.survey import survey
from pipeline.run.state import Run
from pipeline.settings.config import parse_config
from pipeline.train import checkpoint, recipe
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.world import World, choose_device

NETWORKS = (  # factory, image, batch
    ("lenet_300_100", (1, 28, 28), 128),
    ("lenet_5", (1, 28, 28), 128),
    ("torchvision.models.squeezenet1_1", (3, 224, 224), 32),
    ("alexnet_caffe", (3, 227, 227), 32),
)
EVERY, REPEATS = 500, 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = sys.argv[1] if len(sys.argv) > 1 else folder
        Console(width=120).print(measured(storage.join(place, "run")))


def measured(root: str) -> Table:
    """The table; what is written below `root` is removed again."""
    table = Table("network", "MB", "seconds a checkpoint", "seconds a step", f"share at every {EVERY} steps")
    run = Run(root, 1)
    storage.write_json(run.path("lease.json"), {"fence": 1, "pid": 0, "host": "bench"})
    world = World(0, 1, choose_device("auto"))
    for factory, image, batch in NETWORKS:
        table.add_row(*measure(run, world, factory, image, batch))
    storage.remove_tree(run.root)
    return table


def measure(run: Run, world: World, factory: str, image: tuple[int, int, int], batch: int) -> list[str]:
    """A row of the table."""
    config = parse_config({"name": "bench", "model": {"factory": factory}})
    classes = 1000 if image[0] == 3 else 10
    model = build_network(config.model, classes, 0).to(world.device)
    prunable, _ = survey(model, ["*"], [])
    optimizer = recipe.make_optimizer(config.dense, list(model.parameters()))
    images = torch.randn(batch, *image, device=world.device)
    labels = torch.randint(0, classes, (batch,), device=world.device)
    step = timed(lambda: update(model, optimizer, images, labels))
    parameters = dict(model.named_parameters())
    masks = {tensor.name: torch.rand_like(parameters[tensor.name]) < 0.1 for tensor in prunable}

    def save() -> None:
        momentum = recipe.optimizer_tensors(optimizer, list(parameters))
        checkpoint.save(run, "steps/1", Checkpoint(dict(model.state_dict()), masks, momentum, {"step": 1}))

    saving = timed(save)
    size = sum(known.bytes for known in storage.stats(run.path("steps/1")).values()) / 1e6
    share = saving / (saving + EVERY * step)
    return [factory.rpartition(".")[2], f"{size:,.1f}", f"{saving:.3f}", f"{step:.4f}", f"{share:.2%}"]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One update, waited for."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    loss.item()


def timed(what: Callable[[], object]) -> float:
    """Median seconds of a call, after one that does not count."""
    what()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
