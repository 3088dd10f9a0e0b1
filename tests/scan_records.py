"""Records of a scan for tests. What a test does not name stands for the format, not for any result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.data.loader import Batch
from pipeline.run.records import DenseFigures, Level, Scan, ScanOrigin, TensorScan, TogetherRow
from pipeline.scan.inputs import ScanInputs
from pipeline.settings.config import Config
from pipeline.task.feed import Feed

DIFFERENCE: dict[str, Any] = {
    "samples": 100, "top1": 0.9, "low": 0.83, "high": 0.94, "drop": 0.0, "drop_low": -0.04, "drop_high": 0.04,
    "loss": 0.3, "rise": 0.0, "rise_low": -0.01, "rise_high": 0.01,
}  # fmt: skip


def level(density: float, **values: Any) -> Level:
    made = {"kept": max(1, round(1000 * density)), "absolute": density, "quality": 1.0, "method": "fx"}
    return Level(density=density, **{**DIFFERENCE, **made, **values})


def tensor(name: str, weights: int, levels: Iterable[Level], **values: Any) -> TensorScan:
    made = {"kind": "fc", "alive": weights, "sigma": 0.04, "method": "fx", "quality": 1.0}
    return TensorScan(name=name, weights=weights, levels=tuple(levels), **{**made, **values})


def row(density: float, power: float, rise: float, **values: Any) -> TogetherRow:
    return TogetherRow(density=density, power=power, **{**DIFFERENCE, "rise": rise, "keep": {}, **values})


def scan(tensors: Iterable[TensorScan], **values: Any) -> Scan:
    made: dict[str, Any] = {
        "samples": 100,
        "split": "val",
        "dense": DenseFigures(0.9, 0.3),
        "delta": 0.01,
        "after": None,
        "key": "0123456789abcdef",
        "made_of": ScanOrigin("ab", "cd", {"seed": 0}),
    }
    return Scan(tensors=tuple(tensors), **{**made, **values})


def scan_of(
    config: Config, device: torch.device, model: nn.Module, batches: Sequence[Batch], **more: Any
) -> ScanInputs:
    """What a scan with these settings measures levels with."""
    return ScanInputs(config.scan, config.prune, Feed.of(config), device, model, batches, **more)
