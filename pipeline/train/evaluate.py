"""Exact evaluation: each sample once, whatever the number of workers, its answer kept by index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.data.loader import EvalLoader
from pipeline.run.records import Evaluation
from pipeline.settings.config import Config
from pipeline.task.classification import forward, judge
from pipeline.train.world import World


@dataclass(frozen=True)
class Answers:
    """What a network answered, by sample index; arrays of shape (samples,)."""

    right: NDArray[np.bool_]
    right5: NDArray[np.bool_]
    right_present: NDArray[np.bool_] | None
    loss: NDArray[np.float64]
    valid: NDArray[np.bool_]

    def metrics(self) -> Evaluation:
        """What the answers come to, over the readable samples."""
        count = max(1, int(self.valid.sum()))

        def share(right: NDArray[np.bool_]) -> float:
            return int((right & self.valid).sum()) / count

        return Evaluation(
            top1=share(self.right),
            top5=share(self.right5),
            loss=float(self.loss[self.valid].sum()) / count,
            top1_present=None if self.right_present is None else share(self.right_present),
        )


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, config: Config, world: World, classes: int) -> Answers:
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
    for batch in loader.batches(world.rank, world.size):
        logits = forward(model, batch.images.to(world.device, non_blocking=True), config)
        rows[:, batch.indices] = judge(logits, batch, present).cpu()
        count[batch.indices] += 1
    model.train(training)
    rows = world.sum(rows.to(world.device)).cpu()
    count = world.sum(count.to(world.device)).cpu()
    assert bool((count == 1).all()), "evaluation must read each sample exactly once"
    table = rows.numpy()
    return Answers(
        right=table[0] > 0,
        right5=table[1] > 0,
        right_present=table[2] > 0 if present is not None else None,
        loss=table[3],
        valid=table[4] > 0,
    )
