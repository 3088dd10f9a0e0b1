"""The largest batch that a GPU has memory for, found by trying: `secateur plan --device`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline.base.errors import UserError
from pipeline.settings.config import Config
from pipeline.settings.training import Train
from pipeline.train import first_step
from pipeline.train.memory import OutOfMemory
from pipeline.train.world import choose_device

MOST = 2**16  # images of a worker in one part of an update; no larger batch is tried


class Fit(NamedTuple):
    """How many images of a training fit into a worker's GPU at a time, 0 if none, as a batch over all workers."""

    training: str
    images: int
    batch_size: int
    asked: int

    @property
    def sentence(self) -> str:
        """For a person, with the setting to change."""
        asked = f"{self.training}.batch_size={self.asked}"
        if not self.images:
            return f"{asked}: not one image fits into this GPU: lower data.size, or take a smaller network"
        return (
            f"{asked}: {self.images:,} images of a worker fit into this GPU at a time, so that "
            f"{self.training}.batch_size={self.batch_size:,} is the largest with this cluster.workers and "
            f"{self.training}.accumulate"
        )


def find(config: Config, classes: int) -> list[Fit]:
    """For each training, the largest batch that fits into this process's GPU.

    Raises UserError where there is no GPU: a machine's memory is shared, and what fits changes from day to day.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        raise UserError(
            f"--device looks for the largest batch that a GPU has memory for, and device={config.device} is none here: "
            "run it on a machine with one, with device=auto or cuda"
        )
    return [
        _fit(config, name, settings, classes, device)
        for name, settings in first_step.trainings(config.dense, config.retrain).items()
    ]


def _fit(config: Config, name: str, settings: Train, classes: int, device: torch.device) -> Fit:
    def fits(images: int) -> bool:
        torch.cuda.empty_cache()
        try:
            first_step.attempt(config, name, settings, classes, first_step.zeros(config.data, images), device)
        except OutOfMemory:
            return False
        return True

    parts = config.cluster.max_workers * settings.accumulate
    unit = config.data.lanes // math.gcd(config.data.lanes, parts)  # a batch is a multiple of the lanes
    images = largest(fits, unit, MOST)
    return Fit(name, images, images * parts, settings.batch_size)


def largest(fits: Callable[[int], bool], unit: int, most: int) -> int:
    """The largest multiple of `unit`, up to `most`, that fits, or 0: doubled until one does not fit, then halved in."""
    good, bad = 0, most // unit + 1
    while (tried := min(max(1, 2 * good), bad - 1)) > good:
        if not fits(tried * unit):
            bad = tried
            break
        good = tried
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit
