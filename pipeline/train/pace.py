"""How fast a training goes on one rank, and how much of its time goes into waiting for data."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


class Pace:
    """Counts steps and seconds since the last `taken`, or `restart`. The training adds to `steps`."""

    def __init__(self) -> None:
        self.steps = 0
        self.waited = 0.0  # seconds
        self.since = time.monotonic()

    def timed(self, items: Iterator[T]) -> Generator[T, None, None]:
        """The same items; the time that it takes to get each of them is counted. Closing it closes `items`."""
        try:
            while True:
                began = time.monotonic()
                try:
                    item = next(items)
                except StopIteration:
                    return
                finally:
                    self.waited += time.monotonic() - began
                yield item
        finally:
            if isinstance(items, Generator):
                items.close()

    def taken(self) -> tuple[float, float]:
        """Steps a second, and the share of the time (0 to 1) that was waited for items; counting begins anew."""
        passed = max(time.monotonic() - self.since, 1e-9)
        found = self.steps / passed, min(1.0, self.waited / passed)
        self.restart()
        return found

    def without(self, seconds: float) -> None:
        """Leave out seconds that did not go into steps."""
        self.since += seconds

    def restart(self) -> None:
        """Begin to count anew."""
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()
