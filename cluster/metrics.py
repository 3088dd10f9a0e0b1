"""Gauges of a run for Prometheus, set by its driver from the run's events and exported by Ray on the driver's node.

Ray puts `ray_` before each name. infra/monitoring has alerts and a dashboard for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pipeline.run.events import (
    EpochEnded,
    Event,
    LevelMeasured,
    Mirrored,
    Paced,
    Resumed,
    RoundBegun,
    Saved,
    ShardsCounted,
    StageBegun,
    Stepped,
    WorkersBegun,
)

LAST_STEP = "secateur_last_step_timestamp_seconds"
SPEED = "secateur_images_per_second"
WAITING = "secateur_data_wait_ratio"
BAD = "secateur_bad_images"
RETRIES = "secateur_storage_retries"
CHECKPOINT = "secateur_checkpoint_seconds"
RESTARTS = "secateur_restarts"
LAG = "secateur_mlflow_lag_seconds"

PREFIX = "ray_"  # what Ray puts before the names
RUN, RANK = ("run",), ("run", "rank")  # labels
# Name: what it is, and its labels.
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    LAST_STEP: (
        "When the run last got on (a step, an epoch, a level of the scan, a stage), in seconds since 1970.",
        RUN,
    ),
    SPEED: ("Train images a second, of all ranks.", RUN),
    WAITING: ("Share of a rank's time in a training that it waited for data, 0 to 1.", RANK),
    BAD: ("Unreadable images that a rank has met since its process began.", RANK),
    RETRIES: ("Reads and writes that a rank had to try again since its process began.", RANK),
    CHECKPOINT: ("Seconds that the last step checkpoint took.", RUN),
    RESTARTS: ("Starts of worker groups by this driver, beyond the first of each stage.", RUN),
    LAG: ("Seconds for which MLflow has lacked something that the run holds.", RUN),
}


class Gauges:
    """Sets the gauges of a run from its events; any thread may call it. `make` makes Ray's gauge of a name."""

    def __init__(self, run: str, make: Callable[..., Any]) -> None:
        self.run = run
        self.gauges = {name: make(name, description=text, tag_keys=keys) for name, (text, keys) in GAUGES.items()}
        self.restarts = 0
        self.set(RESTARTS, 0)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge of this run."""
        self.gauges[name].set(value, tags={"run": self.run, **labels})

    def __call__(self, event: Event) -> None:
        """Set what an event tells of."""
        match event:
            case Stepped() | EpochEnded() | Resumed() | StageBegun() | ShardsCounted() | LevelMeasured() | RoundBegun():
                self.set(LAST_STEP, time.time())
            case Paced(rank=rank):
                if rank == 0:
                    self.set(SPEED, event.images_per_s)
                for name, value in ((WAITING, event.waiting), (BAD, event.bad), (RETRIES, event.retries)):
                    self.set(name, value, rank=str(rank))
            case Saved(seconds=seconds):
                self.set(CHECKPOINT, seconds)
            case WorkersBegun(attempt=attempt):
                self.restarts += attempt > 1
                self.set(RESTARTS, self.restarts)
                self.set(LAST_STEP, time.time())  # a training's age counts from its start
            case Mirrored(lag=lag):
                self.set(LAG, lag)
