"""How long a training waits for room. Ray Train itself would wait forever, and keep a core busy.

Imported where Ray is up: the base class needs it.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback  # noqa: PLC2701 (test_ray_private.py names it)

from cluster import connect
from pipeline.settings.cluster import asked
from pipeline.settings.config import Config

UP = ("RunningState", "PreemptingState", "ShuttingDownState", "ErroredState", "FinishedState", "AbortedState")
PAUSE_S = 0.5  # between two looks for room


class Patience(ControllerCallback):
    """Ends a training whose workers have not been running for cluster.wait_seconds; lives in Ray Train's controller."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.waiting = connect.Waiting(config.cluster.wait_seconds)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Raise NoRoom, naming what was asked and what the cluster has now."""
        up = type(current_state).__name__ in UP
        if self.waiting.too_long(lacking=not up):
            raise connect.NoRoom(self.message())
        if not up and current_state is previous_state:
            time.sleep(PAUSE_S)

    def message(self) -> str:
        """What is missing, or who has it."""
        wanted = self.config.cluster
        each = {"CPU": wanted.cpus_per_worker, "GPU": wanted.gpus_per_worker}
        free = {kind: ray.available_resources().get(kind, 0.0) for kind, amount in each.items() if amount}
        missing = connect.shortage(connect.nodes(ray), self.config) or (
            f"cluster.workers={asked(wanted.workers)} found no room: {connect.amounts(free)} are free"
        )
        return self.waiting.said(missing)
