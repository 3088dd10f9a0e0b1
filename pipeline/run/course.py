"""How a run's trainings go on, as a journal in RUN/course: a line an epoch, and every EVERY_S within long ones.

The driver writes it from the events that it hears. MLflow's curves are made from it. Whatever goes wrong with it, the
run goes on: the user is told once, and the curves end there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.base.record import Record, optional
from pipeline.run import journal
from pipeline.run.events import EpochEnded, Event, Paced, RoundBegun
from pipeline.run.journal import Kept
from pipeline.run.state import Run, now_ms

FOLDER = "course"
EVERY_S = 30.0  # seconds from one line of a training to the next, within an epoch


@dataclass(frozen=True)
class Moment(Record):
    """A line of the journal: where a training stood at `ms` (since 1970), after update `step` of `steps`.

    `phase` is the training's folder in the run. `density` is that of the weights it trains, a fraction. The loss is the
    mean of the epoch so far; val_top1 is known at the end of an epoch alone.
    """

    ms: int
    phase: str
    step: int
    steps: int
    density: float
    loss: float | None = optional()
    lr: float | None = optional()
    images_per_s: float | None = optional()
    waiting: float | None = optional()
    val_top1: float | None = optional()


class Course:
    """Called with events, from any thread, it writes the journal."""

    def __init__(self, book: Kept) -> None:
        self._book = book
        self._lock = threading.Lock()
        self._density: dict[str, float] = {}
        self._last: dict[str, float] = {}  # when a training's last line was written

    def __call__(self, event: Event) -> None:
        """Write down what an event says of a training."""
        with self._lock:
            moment = self._moment(event)
        if moment is not None:
            self._book.add(moment)

    def _moment(self, event: Event) -> Moment | None:
        now = time.monotonic()
        match event:
            case RoundBegun():
                self._density[event.phase] = event.density
            case EpochEnded(phase=phase, epoch=epoch):
                self._last[phase] = now
                return Moment(
                    now_ms(), phase, epoch.step, event.steps, self._density.get(phase, 1.0), epoch.loss, epoch.lr,
                    epoch.images_per_s, epoch.waiting, epoch.val_top1,
                )  # fmt: skip
            case Paced(phase=phase, rank=0, steps=steps) if steps:
                if now - self._last.setdefault(phase, now - EVERY_S / 2) >= EVERY_S:
                    self._last[phase] = now
                    return Moment(
                        now_ms(), phase, event.step, steps, self._density.get(phase, 1.0), event.loss, event.lr,
                        event.images_per_s, event.waiting,
                    )  # fmt: skip
        return None


@contextmanager
def kept(run: Run, tell: Callable[[str], None]) -> Iterator[Course]:
    """The journal of a run's trainings while the block lasts. Raises nothing of its own."""
    with journal.kept(run, FOLDER, "the curves for MLflow", tell) as book:
        yield Course(book)


def read(root: str) -> tuple[Moment, ...]:
    """The lines of the run in a folder, in their order; none where it is older than the journal."""
    return tuple(journal.read(Run(root, 0), Moment, FOLDER))


@dataclass(frozen=True)
class Placed:
    """A moment, and its place on the run's one axis: the updates of all trainings before it, and its own."""

    at: int
    moment: Moment


def placed(moments: Sequence[Moment], before: int = 0) -> list[Placed]:
    """The moments one after the other, after `before` updates.

    A resumed training makes some updates once more; these moments are left out, so the places only rise. A training of
    the same phase that begins anew after its end is another attempt, and stands behind the first.
    """
    found: list[Placed] = []
    phase, step, steps = "", 0, 0
    seen: set[tuple[int, float | None, float | None]] = set()
    for moment in moments:
        key = (moment.step, moment.loss, moment.val_top1)
        again = moment.phase == phase and step == steps and moment.val_top1 is not None and key not in seen
        if moment.phase != phase or (moment.step <= step and again):
            before, phase, steps = before + step, moment.phase, moment.steps
            seen.clear()
        elif moment.step <= step:
            continue
        found.append(Placed(before + moment.step, moment))
        seen.add(key)
        step = moment.step
    return found
