"""How far a run is, from its events: which stage and round, how fast, and about how long it still takes."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.results.words import duration, number, percent
from pipeline.run.events import (
    SCANNED,
    Doing,
    EpochEnded,
    Event,
    LevelMeasured,
    Noted,
    Outlined,
    Paced,
    Resumed,
    RoundBegun,
    ShardsCounted,
    StageBegun,
    Stepped,
    TogetherMeasured,
    WorkersBegun,
)
from pipeline.run.layout import DENSE, control_folder, round_folder

SCAN = "scan"
WINDOW_S = 120.0  # of work that the pace is taken from; what was before counts less and less


@dataclass(frozen=True)
class Part:
    """A training or the scan: its phase, and its work in images of a training."""

    phase: str
    images: float


class Tracker:
    """Takes a run's events, each with its time in seconds, and knows what follows from them."""

    def __init__(self) -> None:
        self.stages: tuple[str, ...] = ()
        self.stage, self.stage_title, self.stage_number, self.stage_count = "", "", 0, 0
        self.round = 0
        self.rounds: int | None = None
        self.doing = ""
        self.share: float | None = None  # of what is done now
        self.images_per_s: float | None = None
        self.density: float | None = None
        self.loss: float | None = None
        self.val: float | None = None
        self._parts: list[Part] = []
        self._at = 0  # the part that is being worked at; all before it are done
        self._fixed = False
        self._mark: tuple[str, float, float] | None = None  # a part, its share that was done, and when that was
        self._images = self._seconds = 0.0  # done of late, and the time that they took

    def __call__(self, event: Event, when: float) -> None:
        """Take an event that came at that time."""
        match event:
            case StageBegun():
                self._begin(event, when)
            case Outlined():
                self._outline(event)
            case ShardsCounted(text, done, total):
                self.doing, self.share = f"{text}: {done:,} of {total:,}", done / max(1, total)
            case WorkersBegun(stage=stage, workers=workers):
                self.doing = f"{workers} worker{'s' * (workers > 1)} began"
                if stage == DENSE:
                    self._reached(DENSE, 0.0, when, anew=True)
            case LevelMeasured(tensor=tensor, done=done, total=total):
                self.doing, self.share = f"{done:,} of {total:,} levels, {tensor}", done / max(1, total)
                self._reached(SCAN, done / max(1, total), when)
            case TogetherMeasured(density=density):
                self.doing, self.share = f"all tensors together at density {percent(density)}", None
            case RoundBegun(phase=phase, density=density, before=before):
                self.density, self.val = density, before
                self.doing = f"{phase} begins"
                self._reached(phase, 0.0, when, anew=True)
            case Resumed(phase, step, steps):
                self.doing = f"{phase}: step {step:,} of {steps:,}"
                self._reached(phase, step / max(1, steps), when, anew=True)
            case Stepped(phase, step, steps):
                self.doing = f"{phase}: step {step:,} of {steps:,}"
                self._reached(phase, step / max(1, steps), when)
            case EpochEnded(phase, epoch, epochs, steps):
                self.doing = f"{phase}: epoch {epoch.epoch:,} of {epochs:,}"
                self.loss, self.val = epoch.loss, epoch.val_top1
                self.images_per_s = epoch.images_per_s or self.images_per_s
                self._reached(phase, epoch.step / max(1, steps), when)
            case Paced(rank=rank, images_per_s=images_per_s):
                self.images_per_s = images_per_s if rank == 0 else self.images_per_s
            case Doing(text):
                self.doing, self.share = text, None
            case Noted(text):
                if not self.share:
                    self.doing = text
            case _:
                pass

    def _begin(self, event: StageBegun, when: float) -> None:
        self.stage, self.stage_title = event.stage, event.title
        self.stage_number, self.stage_count = event.number, event.count
        self.doing, self.share, self.images_per_s, self._mark = "", None, None, None
        part = {DENSE: DENSE, SCAN: SCAN, "rounds": round_folder(1)}.get(event.stage)
        if part is not None and (place := self._place(part)) is not None:
            self._at = place + event.skipped
            self._mark = (part, 0.0, when)
        if event.stage == "final" or (event.stage == "rounds" and event.skipped):
            self._at = len(self._parts)

    def _outline(self, event: Outlined) -> None:
        self.stages, self.rounds, self._fixed = event.stages, event.rounds, event.rounds is not None
        numbers = range(1, (event.rounds or 0) + 1)
        self._parts = [Part(DENSE, event.dense)]
        if SCAN in event.stages:
            self._parts.append(Part(SCAN, event.scan * SCANNED))
        self._parts += [Part(round_folder(number), event.round) for number in numbers]
        if event.control:
            self._parts += [Part(control_folder(number), event.round) for number in numbers]

    def _place(self, phase: str) -> int | None:
        return next((place for place, part in enumerate(self._parts) if part.phase == phase), None)

    def _reached(self, phase: str, share: float, when: float, anew: bool = False) -> None:
        """Note how much of a part is done; what was done since the last such note counts towards the pace."""
        self.share = share
        if phase.startswith("rounds/"):
            part = phase.split("/")[1].removeprefix("control-")
            self.round = int(part) if part.isdigit() else self.round
        place = self._place(phase)
        if place is None:
            return
        if self._mark is not None and self._mark[0] == phase and not anew and share > self._mark[1]:
            self._images += (share - self._mark[1]) * self._parts[place].images
            self._seconds += when - self._mark[2]
            kept = min(1.0, WINDOW_S / self._seconds) if self._seconds else 1.0
            self._images, self._seconds = kept * self._images, kept * self._seconds
        self._at, self._mark = place, (phase, share, when)

    @property
    def left_s(self) -> float | None:
        """About how many seconds the trainings and the scan still take at the pace so far; None where none is known."""
        if not self._fixed or not self._images or not self._seconds:
            return None
        done = self._mark[1] if self._mark is not None and self._at == self._place(self._mark[0]) else 0.0
        ahead = self._parts[self._at :]
        left = sum(part.images for part in ahead) - (done * ahead[0].images if ahead else 0.0)
        return max(0.0, left) * self._seconds / self._images

    def place(self) -> str:
        """Which stage, and which round."""
        said = f"stage {self.stage_number} of {self.stage_count}: " if self.stage_count else ""
        said += self.stage_title
        if self.stage == "rounds" and self.round:
            control = ", dense control" if "control" in self.doing else ""
            of = f" of {self.rounds}" if self.rounds else ""
            said += f", round {self.round}{of}{control}"
        return said

    def times(self, gone_s: float) -> str:
        """Time gone, and left where it is known."""
        left = self.left_s
        return f"{clock(gone_s)} gone" + ("" if left is None else f", about {clock(left)} left")

    def figures(self) -> list[str]:
        """Pace, density, loss and val, those of them that are known."""
        found = []
        if self.images_per_s:
            found.append(f"{self.images_per_s:,.0f} images/s")
        if self.density is not None and self.stage == "rounds":
            found.append(f"density {percent(self.density)}")
        if self.loss is not None:
            found.append(f"loss {number(self.loss)}")
        if self.val is not None:
            found.append(f"val {percent(self.val)}")
        return found


def clock(seconds: float) -> str:
    """A duration in whole seconds, or in whole minutes from an hour on."""
    return duration(float(round(seconds)))
