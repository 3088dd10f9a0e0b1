"""Exact evaluation: each sample once, whatever the number of workers, its answer kept by index."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pipeline.data.loader import EvalLoader
from pipeline.task.answers import Answers
from pipeline.task.feed import Feed
from pipeline.train.world import World


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, feed: Feed, world: World, classes: int) -> Answers:
    """Evaluate in eval mode on a whole split; every rank returns all answers.

    Raises AssertionError if a sample was not read exactly once.
    """
    size = len(loader.split)
    seen = np.unique(loader.split.labels)
    present = torch.from_numpy(seen).to(world.device) if len(seen) < classes else None
    rows = torch.zeros(5, size, dtype=torch.float64)
    count = torch.zeros(size, dtype=torch.int64)
    training = model.training
    model.eval()
    for number, batch in enumerate(loader.batches(world.rank, world.size)):
        world.at(f"batch {number} of an evaluation")
        output = feed.forward(model, batch.images.to(world.device, non_blocking=True))
        rows[:, batch.indices] = feed.task.judge(output, batch, present).cpu()
        count[batch.indices] += 1
    model.train(training)
    rows = world.sum(rows.to(world.device)).cpu()
    count = world.sum(count.to(world.device)).cpu()
    assert bool((count == 1).all()), "evaluation must read each sample exactly once"
    return Answers.of(rows, present is not None)
