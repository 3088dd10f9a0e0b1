"""The sensitivity scan: each tensor pruned alone at several densities, on val, without retraining (figure 6)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.prune.criteria import scores
from pipeline.prune.masks import top_mask
from pipeline.results.stats import wilson
from pipeline.train import batch_norm
from pipeline.train.evaluate import forward, judge


@dataclass(frozen=True)
class Level:
    """The network with one tensor at one density. quality = threshold / std of the tensor (paper section 3)."""

    density: float
    quality: float
    top1: float
    loss: float
    low: float
    high: float


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[Batch], config: Config, device: torch.device) -> dict[str, float]:
    """top1, its 95% interval (low, high), loss and the number of samples, in eval mode, over some batches."""
    model.eval()
    right, loss, count = 0, 0.0, 0
    for batch in batches:
        logits = forward(model, batch.images.to(device, non_blocking=True), config)
        rows = judge(logits, batch, None).cpu()
        right += int((rows[0] * rows[4]).sum())
        loss += float((rows[3] * rows[4]).sum())
        count += int(rows[4].sum())
    low, high = wilson(right, count)
    return {"top1": right / count, "loss": loss / count, "low": low, "high": high, "samples": count}


def sigma(weight: Tensor) -> float:
    """The standard deviation of a tensor's weights, over all of them (population form)."""
    return float(weight.detach().double().std(correction=0))


def scan_tensor(
    model: nn.Module,
    name: str,
    levels: Iterable[float],
    batches: list[Batch],
    config: Config,
    device: torch.device,
    calibration: Sequence[Batch] = (),
) -> Generator[Level]:
    """Yield each level of one tensor as it is known. The tensor is put back at the end, also after an error.

    At each level batch norm's statistics are those of the `calibration` batches, if there are any, and then put back.
    """
    weight = dict(model.named_parameters())[name]
    dense = weight.detach().clone()
    ranking = scores(config.prune.criterion, {name: dense}, config.seed)[name]
    alive = torch.ones_like(dense, dtype=torch.bool)
    std = sigma(dense)
    try:
        for density in levels:
            keep = max(1, round(density * dense.numel()))
            mask = top_mask(ranking, alive, keep)
            weight.data.copy_(dense * mask)
            smallest = float(dense[mask].abs().min())
            with batch_norm.recalibrated(model, calibration, config, device):
                found = accuracy(model, batches, config, device)
            quality = smallest / std if std > 0 else 0.0
            yield Level(density, quality, found["top1"], found["loss"], found["low"], found["high"])
    finally:
        weight.data.copy_(dense)


def quality(levels: list[dict[str, Any]], dense_top1: float, delta: float) -> float:
    """The largest quality whose drop stays within `delta`, read off a measured curve.

    The curve runs from quality 0 (dense, no drop) through the levels in falling density; where it first
    crosses `delta` the quality is interpolated between the two levels around the crossing.
    """
    previous_quality, previous_drop = 0.0, 0.0
    for level in sorted(levels, key=lambda level: -level["density"]):
        drop = dense_top1 - level["top1"]
        if drop > delta:
            share = (delta - previous_drop) / (drop - previous_drop)
            return previous_quality + share * (level["quality"] - previous_quality)
        previous_quality, previous_drop = level["quality"], drop
    return previous_quality


def join(
    trials: dict[str, list[dict[str, Any]]],
    prunable: list[Any],
    weights: dict[str, Tensor],
    dense: dict[str, float],
    config: Config,
) -> dict[str, Any]:
    """The content of scan.json from the levels of all tensors.

    A quality can come out 0 where the very first level already loses more than delta; the lowest positive
    level is then halved instead, since |w| / (q * std) needs q > 0.
    """
    tensors = []
    for tensor in prunable:
        levels = sorted(trials[tensor.name], key=lambda level: -level["density"])
        found = quality(levels, dense["top1"], config.scan.delta)
        floor = next((level["quality"] / 2 for level in levels if level["quality"] > 0), 1e-6)
        tensors.append(
            {
                "name": tensor.name,
                "kind": tensor.kind,
                "weights": tensor.weights,
                "sigma": sigma(weights[tensor.name]),
                "levels": levels,
                "quality": found if found > 0 else floor,
            }
        )
    return {
        "samples": dense["samples"],
        "split": "val",
        "dense": {"top1": dense["top1"], "loss": dense["loss"]},
        "delta": config.scan.delta,
        "tensors": tensors,
    }


def as_dict(level: Level) -> dict[str, Any]:
    """A level as plain values."""
    return asdict(level)
