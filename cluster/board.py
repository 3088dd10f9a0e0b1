"""What ranks tell the driver: events, why one ended, which one hangs, whether they left."""

from __future__ import annotations

import threading
from typing import Any

from cluster import connect
from pipeline.run.events import Event, Progress


class Board:
    """Events from rank 0 to the driver: a small actor that is read every half second."""

    def __init__(self, ray: Any, progress: Progress) -> None:
        self.ray, self.progress = ray, progress
        self.actor = ray.remote(num_cpus=0)(Inbox).options(scheduling_strategy=connect.here(ray)).remote()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Board:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self.ray.kill(self.actor)

    def _poll(self) -> None:
        while True:
            last = self._stop.wait(0.5)
            try:
                for event in self.ray.get(self.actor.take.remote(), timeout=60):
                    self.progress(event)
            except self.ray.exceptions.GetTimeoutError:
                continue  # a busy machine; the events wait in the actor
            except self.ray.exceptions.RayError:
                return  # The cluster is going away; the training says why.
            if last:
                return


class Inbox:
    """The actor: events not yet taken, and what the ranks said of themselves. It loads no torch."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reason: dict[str, Any] | None = None
        self.stuck: str | None = None
        self.going = False
        self.attempt = 1
        self.here: set[int] = set()

    def begin(self, rank: int) -> tuple[int, dict[str, Any] | None]:
        """Called first by each rank: the number of its group's start, and why a rank ended, if one did.

        A rank that comes again is of a new group. Ranks that had left are back.
        """
        self.going, self.stuck = False, None
        if rank in self.here:
            self.attempt, self.here = self.attempt + 1, set()
        self.here.add(rank)
        return self.attempt, self.reason

    def leave(self) -> None:
        """Note that the ranks leave a node that is taken away."""
        self.going = True

    def left(self) -> bool:
        """Whether the ranks left a node, and have work to continue."""
        return self.going

    def hang(self, found: str) -> None:
        """Note which rank hangs; the first to find one stands."""
        self.stuck = self.stuck or found

    def hung(self) -> str | None:
        """Which rank hung in the last try, if one did."""
        return self.stuck

    def end(self, reason: dict[str, Any]) -> None:
        """Note why a rank ended; the first reason stands."""
        self.reason = self.reason or reason

    def ended(self) -> dict[str, Any] | None:
        """Why a rank ended, if one did."""
        return self.reason

    def push(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken
