"""When the ranks of a training look up from their steps together, a few seconds apart."""

from __future__ import annotations

import time

import torch

from pipeline.train.world import World

LOOK_EVERY, LOOK_EVERY_S = 10, 2.0  # the least steps and seconds between looks, since a look waits for all ranks


class Looks:
    """The steps at which the ranks look whether to save or to leave; every rank holds an equal one.

    The step of the next look follows from the ranks' mean pace, so it is the same on every rank.
    """

    def __init__(self, world: World, minutes: float, step: int) -> None:
        """`minutes` after which a checkpoint is too old, 0 for never; the training goes on after `step` updates."""
        self.world, self.seconds = world, 60.0 * minutes
        self.last, self.then = step, time.monotonic()
        self.next = (step // LOOK_EVERY + 1) * LOOK_EVERY
        self.save_time = self.then

    def due(self, step: int) -> bool:
        """Whether the ranks look up after update `step`."""
        return step == self.next

    def late(self, step: int) -> bool:
        """Look up: whether the last checkpoint is too old by rank 0's clock, the same answer on every rank."""
        now = time.monotonic()
        age = now - self.save_time if self.world.first else 0.0
        told = torch.tensor([now - self.then, age], dtype=torch.float64, device=self.world.device)
        took, age = self.world.sum(told).tolist()
        pace = took / self.world.size / (step - self.last)
        self.last, self.then = step, now
        self.next += max(1, int(LOOK_EVERY_S / max(pace, 1e-6) / LOOK_EVERY)) * LOOK_EVERY
        return 0.0 < self.seconds <= age

    def saved(self) -> None:
        """Note that a checkpoint was saved just now."""
        self.save_time = time.monotonic()
