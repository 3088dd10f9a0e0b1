"""What a person sees of a run that goes on: one live block on a terminal, or a line now and then in a log."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import assert_never

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipeline.base.environment import number
from pipeline.base.hiding import hide
from pipeline.cli.messages import make_console
from pipeline.cli.progress import Tracker, clock
from pipeline.run.events import (
    Busy,
    Doing,
    EpochEnded,
    Event,
    LevelMeasured,
    Mirrored,
    Noted,
    Outlined,
    Paced,
    Resumed,
    RoundBegun,
    Saved,
    ShardsCounted,
    StageBegun,
    Stepped,
    TogetherMeasured,
    Warned,
    WorkersBegun,
)
from pipeline.run.records import Epoch

BAR = 30  # characters
SILENT_S = 10.0  # after so many seconds more than between two lines, a log says that nothing was reported


def line_every_s() -> float:
    """Seconds between two lines of a log while nothing begins or ends; 0 gives a line for each epoch."""
    return number("SECATEUR_LINE_SECONDS", 30)


def pace(epoch: Epoch) -> str:
    """How fast an epoch went, and which part of its time its steps waited for data."""
    if epoch.images_per_s is None or epoch.waiting is None:
        return ""
    return f", {epoch.images_per_s:,.0f} images/s, {epoch.waiting:.0%} of it waiting for data"


def said(event: Event) -> str:
    """What an event says, in a sentence; empty for what only gauges ask for."""
    match event:
        case Warned(text):
            return f"warning: {text}"
        case Noted(text):
            return text
        case StageBegun(title=title, skipped=skipped, number=number, count=count):
            place = f"stage {number} of {count}: " if count else ""
            return f"{place}{title}: {'finished before, skipped' if skipped else 'started'}"
        case ShardsCounted(text, done, total):
            return f"shards: {text}: {done}/{total}"
        case LevelMeasured(done=done, total=total):
            return f"scan: {done} levels measured" if done == total else f"scan: {done}/{total} levels"
        case TogetherMeasured(density, rise, power):
            return (
                f"scan: all tensors together at density {density:.2%}: the loss rises by at least {rise:.4f} "
                f"(damages composed by the power {power:g})"
            )
        case RoundBegun():
            return _round(event)
        case Resumed(phase, step, steps, workers):
            where = f" on {workers} workers" if workers > 1 else ""
            return f"{phase}: resumed at step {step} of {steps}{where}"
        case Stepped(phase, step, steps):
            return f"{phase}: {step}/{steps}"
        case EpochEnded(phase, epoch, epochs):
            return (
                f"{phase}: epoch {epoch.epoch}/{epochs}, loss {epoch.loss:.4f}, val {epoch.val_top1:.2%}, "
                f"{epoch.seconds:.1f} s{pace(epoch)}"
            )
        case WorkersBegun(stage, attempt, workers):
            again = f", start {attempt}" if attempt > 1 else ""
            return f"{stage}: {workers} worker{'s' * (workers > 1)} began{again}"
        case Paced() | Saved() | Mirrored() | Busy() | Outlined() | Doing():
            return ""  # for the log, for gauges, and for what is shown as going on
        case _:
            assert_never(event)


def _round(event: RoundBegun) -> str:
    """A round is pruned, and its retraining begins."""
    return (
        f"{event.phase}: {event.kept:,} weights {'kept in the end' if event.gradual else 'kept'} "
        f"({event.density:.2%}), val {event.before:.2%}"
        + (f", {event.dead:,} of dead neurons gone" if event.dead else "")
        + "".join(f", {path} drops {rate:.3g}" for path, rate in event.dropout.items() if rate)
    )


def ends(event: Event) -> bool:
    """Whether an event is one that a log always shows: a beginning, an end, or what somebody should know."""
    match event:
        case EpochEnded(epoch=epoch, epochs=epochs, steps=steps):
            return epoch.epoch == epochs or epoch.step == steps
        case LevelMeasured(done=done, total=total) | ShardsCounted(done=done, total=total):
            return done == total
        case Stepped() | TogetherMeasured():
            return False
        case _:
            return True


class Display:
    """Shows a run's events. To be used in a `with` block, from any thread."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.tracker = Tracker()
        self.every = line_every_s()
        self.started = self.last_line = time.monotonic()
        self.day = ""
        self.live: Live | None = None
        self._stop = threading.Event()
        self._lock = threading.RLock()
        self._ticking = threading.Thread(target=self._tick, name="display", daemon=True)

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live = Live(get_renderable=self.block, console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        elif self.every:
            self._ticking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self.live is not None:
            self.live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self.heard(event, time.time())

    def heard(self, event: Event, when: float, shown: bool = True) -> None:
        """Show an event that came at that time (seconds since 1970), or only take note of it."""
        with self._lock:
            self.tracker(event, when)
            if not shown:
                return
            text = said(event)
            if text and (ends(event) or (self.live is None and self._due())):
                self.line(text if ends(event) or not self.every else self.now(text))

    def line(self, text: str) -> None:
        """One line that stays, with the time of day."""
        with self._lock:
            self.last_line = time.monotonic()
            moment = datetime.now().astimezone()
            if (day := moment.strftime("%Y-%m-%d")) != self.day:  # once a day
                self.day = day
                self.console.print(f"{moment:%H:%M:%S} {day} ({moment.tzname()})", markup=False)
            self.console.print(f"{moment:%H:%M:%S} {hide(text)}", markup=False)

    def now(self, text: str) -> str:
        """What is done now, and how far the whole is."""
        parts = (self.tracker.place(), self.tracker.times(time.monotonic() - self.started))
        return f"{text} [{', '.join(part for part in parts if part)}]"

    def block(self) -> Group:
        """The live block: where the run is and since when, what it does, and how well it goes."""
        tracker, gone = self.tracker, time.monotonic() - self.started
        done = "" if tracker.share is None else _bar(tracker.share)
        head = " · ".join(part for part in (tracker.place(), tracker.times(gone)) if part)
        rows = [head, f"{done} {tracker.doing}".strip(), " · ".join(tracker.figures())]
        return Group(*(Text(hide(row), no_wrap=True, overflow="ellipsis") for row in rows if row))

    def _due(self, more_s: float = 0.0) -> bool:
        return time.monotonic() - self.last_line >= self.every + more_s

    def _tick(self) -> None:
        """In a log, say now and then what goes on, also where nothing is reported."""
        while not self._stop.wait(min(1.0, self.every)):
            with self._lock:
                if self._due(SILENT_S) and self.tracker.doing:
                    silent = clock(time.monotonic() - self.last_line)
                    self.line(self.now(f"still at it after {silent}: {self.tracker.doing}"))


def _bar(share: float) -> str:
    full = round(BAR * min(1.0, max(0.0, share)))
    return "█" * full + "░" * (BAR - full)
