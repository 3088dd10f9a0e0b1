"""Exact evaluation: each sample once, whatever the number of workers, its answer kept by index."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Config
from pipeline.data.images import normalize
from pipeline.data.loader import Batch, EvalLoader
from pipeline.distributed import World


@dataclass(frozen=True)
class Answers:
    """What a network answered, by sample index; arrays of shape (samples,)."""

    right: NDArray[np.bool_]
    right5: NDArray[np.bool_]
    right_present: NDArray[np.bool_] | None
    loss: NDArray[np.float64]
    valid: NDArray[np.bool_]

    def metrics(self) -> dict[str, float | None]:
        """top1, top5, loss (nats) and top1_present as fractions of the readable samples."""
        count = max(1, int(self.valid.sum()))

        def share(right: NDArray[np.bool_]) -> float:
            return int((right & self.valid).sum()) / count

        return {
            "top1": share(self.right),
            "top5": share(self.right5),
            "loss": float(self.loss[self.valid].sum()) / count,
            "top1_present": None if self.right_present is None else share(self.right_present),
        }


def forward(model: nn.Module, images: Tensor, config: Config, precision: str = "fp32") -> Tensor:
    """Logits (n, classes) for uint8 images (n, channels, size, size) on the model's device.

    float32, or float64 where the network gives that.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(inputs(images, config))
    return logits if logits.dtype == torch.float64 else logits.float()


def inputs(images: Tensor, config: Config) -> Tensor:
    """What the network takes, float32, for uint8 images (n, channels, size, size), on their device."""
    channels_last = config.retrain.channels_last or config.dense.channels_last
    return normalize(images, config.data.mean, config.data.std, channels_last)


def judge(logits: Tensor, batch: Batch, present: Tensor | None) -> Tensor:
    """Five rows for a batch: right, right in 5, right among the classes present, loss, valid; shape (5, n)."""
    labels = batch.labels.to(logits.device)
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    rows = torch.zeros(5, len(labels), dtype=torch.float64, device=logits.device)
    rows[0] = (logits.argmax(1) == labels).double()
    rows[1] = (top5 == labels[:, None]).any(1).double()
    if present is not None:
        rows[2] = (present[logits[:, present].argmax(1)] == labels).double()
    rows[3] = F.cross_entropy(logits, labels, reduction="none").double()
    rows[4] = batch.weights.to(logits.device).double()
    return rows


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
