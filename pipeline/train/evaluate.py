"""Exact evaluation: each sample once, whatever the number of workers, its answer kept by index."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pipeline.data.loader import EvalLoader
from pipeline.task.answers import Answers
from pipeline.task.feed import Feed
from pipeline.train.feeder import on_device
from pipeline.train.world import World


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, feed: Feed, world: World, classes: int) -> Answers:
    """Evaluate in eval mode on a whole split; every rank returns all answers.

    Raises AssertionError if a sample was not read exactly once.
    """
    size = len(loader.split)
    seen = np.unique(loader.split.labels)
    present = torch.from_numpy(seen).to(world.device) if len(seen) < classes else None
    rows = torch.zeros(5, size, dtype=torch.float64, device=world.device)
    count = np.zeros(size, np.int64)
    training = model.training
    model.eval()
    for number, batch in enumerate(on_device(loader.batches(world.rank, world.size), world.device)):
        world.at(f"batch {number} of an evaluation")
        output = feed.forward(model, batch.images, feed.eval_precision)
        rows[:, batch.indices.to(world.device, non_blocking=True)] = feed.task.judge(output, batch, present)
        count[batch.indices.numpy()] += 1
    model.train(training)
    counted = world.sum(torch.from_numpy(count).to(world.device)).cpu()
    assert bool((counted == 1).all()), "evaluation must read each sample exactly once"
    return Answers.of(world.sum(rows).cpu(), present is not None)
