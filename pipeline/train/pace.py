"""How fast a training goes on one rank, and how much of its time goes into waiting for data."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Count:
    """Steps, and seconds in which data were waited for, since a moment."""

    steps: int = 0
    waited: float = 0.0
    since: float = field(default_factory=lambda: time.monotonic())

    def rates(self) -> tuple[float, float]:
        """Steps a second, and the share of the time (0 to 1) in which data were waited for."""
        passed = max(time.monotonic() - self.since, 1e-9)
        return self.steps / passed, min(1.0, self.waited / passed)


class Pace:
    """Counts steps and waiting: `recent` since the last report, `epoch` since the epoch began."""

    def __init__(self) -> None:
        self.recent, self.epoch = Count(), Count()

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
                    for count in (self.recent, self.epoch):
                        count.waited += time.monotonic() - began
                yield item
        finally:
            if isinstance(items, Generator):
                items.close()

    def stepped(self) -> None:
        """Note that a step is made."""
        for count in (self.recent, self.epoch):
            count.steps += 1

    def taken(self) -> tuple[float, float]:
        """The rates since the last report; counting for the next begins."""
        found = self.recent.rates()
        self.recent = Count()
        return found

    def epoch_ended(self) -> tuple[float, float]:
        """The rates of the epoch; counting for the next begins."""
        found = self.epoch.rates()
        self.epoch = Count()
        return found

    def without(self, seconds: float) -> None:
        """Leave out seconds that did not go into steps."""
        for count in (self.recent, self.epoch):
            count.since += seconds
