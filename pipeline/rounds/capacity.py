"""The largest batch that a GPU has memory for, found by trying: `secateur plan --device`."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline.base.errors import UserError
from pipeline.settings.config import Config
from pipeline.settings.training import Train
from pipeline.train import first_step
from pipeline.train.memory import OutOfMemory
from pipeline.train.world import choose_device, configure_process

MOST = 2**16  # images of a worker at a time; no more are tried


class Fit(NamedTuple):
    """The largest batch of a training, over all workers, 0 if none fits, and the images that lie in a GPU at a time.

    `least` is the smallest number of images that was tried.
    """

    training: str
    batch_size: int
    images: int
    asked: int
    least: int

    @property
    def sentence(self) -> str:
        """For a person, with the setting to change."""
        asked = f"{self.training}.batch_size={self.asked}"
        if not self.batch_size:
            return (
                f"{asked}: not even {self.least} images, the fewest that data.lanes and cluster.workers allow, fit "
                f"into this GPU: raise {self.training}.accumulate or cluster.workers, lower data.lanes or data.size, "
                "or take a smaller network"
            )
        return (
            f"{asked}: {self.images:,} images of a worker fit into this GPU at a time, so that "
            f"{self.training}.batch_size={self.batch_size:,} is the largest with this cluster.workers and "
            f"{self.training}.accumulate (two steps were tried, with masks; the exchange between workers takes a "
            "little more)"
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
    configure_process(config.threads, config.reproducible)
    return [
        _fit(config, name, settings, classes, device)
        for name, settings in first_step.trainings(config.dense, config.retrain).items()
    ]


def _fit(config: Config, name: str, settings: Train, classes: int, device: torch.device) -> Fit:
    lanes = -(-config.data.lanes // config.cluster.min_workers)  # of the worker that has most of them

    def images(samples: int) -> int:
        """Images at a time, of a batch with so many samples in each lane."""
        return -(-samples * lanes // settings.accumulate)

    fitted = False

    def fits(samples: int) -> bool:
        nonlocal fitted
        gc.collect()
        torch.cuda.empty_cache()
        batch = first_step.zeros(config.data, images(samples))
        try:
            first_step.attempt(config, name, settings, classes, batch, device, first_step.Tries(2))
        except OutOfMemory:
            return False
        except UserError:
            if not fitted:
                raise
            return False  # too large for a kernel, say: whatever it is, smaller ones work
        fitted = True
        return True

    least = next(samples for samples in range(1, MOST) if images(samples) >= first_step.SAMPLES)
    samples = largest(fits, least, max(least, MOST * settings.accumulate // lanes))
    return Fit(name, samples * config.data.lanes, images(samples), settings.batch_size, images(least))


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` to `most` that fits, or 0: doubled until one does not fit, then halved in."""
    good, bad = 0, most + 1
    while (tried := min(max(least, 2 * good), bad - 1)) > good:
        if not fits(tried):
            bad = tried
            break
        good = tried
    while good and bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good
