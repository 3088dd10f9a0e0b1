"""Events that a run reports while it goes on. Each is a small record; the display matches on its type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.run.records import Epoch, Level


@dataclass(frozen=True)
class Warned:
    """Something that the user should know, and may want to fix."""

    text: str


@dataclass(frozen=True)
class Noted:
    """Something that happened."""

    text: str


@dataclass(frozen=True)
class StageBegun:
    """A stage begins, or is skipped since it was finished before."""

    stage: str
    title: str
    skipped: bool = False


@dataclass(frozen=True)
class ShardsCounted:
    """How far the shards are, in what `text` names."""

    text: str
    done: int
    total: int


@dataclass(frozen=True)
class LevelMeasured:
    """A level of the scan, the `done`-th of `total`."""

    tensor: str
    level: Level
    done: int
    total: int


@dataclass(frozen=True)
class TogetherMeasured:
    """All tensors were pruned together at a density: the least rise of the loss (nats), and the power that gave it."""

    density: float
    rise: float
    power: float


@dataclass(frozen=True)
class RoundBegun:
    """A round is pruned and is now retrained. `before` is top1 on val; `gradual`: the weights go during retraining."""

    phase: str
    density: float
    kept: int
    dead: int
    before: float
    dropout: dict[str, float]
    gradual: bool


@dataclass(frozen=True)
class Resumed:
    """A training goes on from a step checkpoint."""

    phase: str
    step: int
    steps: int
    workers: int


@dataclass(frozen=True)
class Stepped:
    """A training is at a step within an epoch."""

    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class Paced:
    """How fast a training goes, since the last such report of this rank.

    `images_per_s` are those of all ranks; `waiting` is the share (0 to 1) of this rank's time in which it waited for
    data. This rank has met `bad` unreadable images and made `retries` of reads and writes since its process began.
    `loss` is the mean of the epoch so far, as this rank knows it; `steps` are those of the whole training.
    """

    phase: str
    step: int
    rank: int
    images_per_s: float
    waiting: float
    bad: int
    retries: int
    loss: float | None = None
    lr: float | None = None
    steps: int = 0


@dataclass(frozen=True)
class Saved:
    """A training wrote a step checkpoint, which took so many seconds."""

    phase: str
    step: int
    seconds: float


@dataclass(frozen=True)
class WorkersBegun:
    """The workers of a stage begin; `attempt` counts their starts, from 1, by this driver."""

    stage: str
    attempt: int
    workers: int


@dataclass(frozen=True)
class Mirrored:
    """MLflow lacks what the run has held for `lag` seconds; 0 where it lacks nothing."""

    lag: float


@dataclass(frozen=True)
class EpochEnded:
    """An epoch of a training ended."""

    phase: str
    epoch: Epoch
    epochs: int
    steps: int


Event = (
    Warned
    | Noted
    | StageBegun
    | ShardsCounted
    | LevelMeasured
    | TogetherMeasured
    | RoundBegun
    | Resumed
    | Stepped
    | Paced
    | Saved
    | WorkersBegun
    | Mirrored
    | EpochEnded
)
Progress = Callable[[Event], None]


def unheard(event: Event) -> None:
    """A progress function that drops every event."""
