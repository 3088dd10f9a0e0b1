"""Events that a run reports while it goes on. Each is a small record; the display matches on its type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.base.record import Record
from pipeline.run.records import Epoch, Level

SCANNED = 1 / 3  # of a training step's time an image takes that is only looked at: a forward pass of three


@dataclass(frozen=True)
class Warned(Record):
    """Something that the user should know, and may want to fix."""

    text: str


@dataclass(frozen=True)
class Noted(Record):
    """Something that happened."""

    text: str


@dataclass(frozen=True)
class Doing(Record):
    """What is begun now, and may take a while; it is no line of its own."""

    text: str


@dataclass(frozen=True)
class StageBegun(Record):
    """A stage begins, the `number`-th of `count`, or is skipped since it was finished before."""

    stage: str
    title: str
    skipped: bool = False
    number: int = 0
    count: int = 0


@dataclass(frozen=True)
class Outlined(Record):
    """What a run is to do, once its data are known: its stages, its rounds, and the images that each part takes.

    `rounds` is None where they depend on what is measured. `dense`, `round` and `scan` count images: those of the dense
    training, of the retraining of one round, and those that the scan looks at. With `control` the dense network gets
    the training of the rounds, too.
    """

    stages: tuple[str, ...]
    rounds: int | None
    dense: int
    round: int
    scan: int
    control: bool


@dataclass(frozen=True)
class ShardsCounted(Record):
    """How far the shards are, in what `text` names."""

    text: str
    done: int
    total: int


@dataclass(frozen=True)
class LevelMeasured(Record):
    """A level of the scan, the `done`-th of `total`."""

    tensor: str
    level: Level
    done: int
    total: int


@dataclass(frozen=True)
class TogetherMeasured(Record):
    """All tensors were pruned together at a density: the least rise of the loss (nats), and the power that gave it."""

    density: float
    rise: float
    power: float


@dataclass(frozen=True)
class RoundBegun(Record):
    """A round is pruned and is now retrained. `before` is top1 on val; `gradual`: the weights go during retraining."""

    phase: str
    density: float
    kept: int
    dead: int
    before: float
    dropout: dict[str, float]
    gradual: bool


@dataclass(frozen=True)
class Resumed(Record):
    """A training goes on from a step checkpoint."""

    phase: str
    step: int
    steps: int
    workers: int


@dataclass(frozen=True)
class Stepped(Record):
    """A training is at a step within an epoch."""

    phase: str
    step: int
    steps: int


@dataclass(frozen=True)
class Paced(Record):
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
class Saved(Record):
    """A training wrote a step checkpoint, which took so many seconds."""

    phase: str
    step: int
    seconds: float


@dataclass(frozen=True)
class WorkersBegun(Record):
    """The workers of a stage begin; `attempt` counts their starts, from 1, by this driver."""

    stage: str
    attempt: int
    workers: int


@dataclass(frozen=True)
class Mirrored(Record):
    """MLflow lacks what the run has held for `lag` seconds; 0 where it lacks nothing."""

    lag: float


@dataclass(frozen=True)
class Busy(Record):
    """What a machine was busy with at `ms` (since 1970). `parts` are its processors and GPUs, `values` by MLflow's
    names of system metrics: percent, megabytes, watts."""

    node: str
    ms: int
    parts: str
    values: dict[str, float]


@dataclass(frozen=True)
class EpochEnded(Record):
    """An epoch of a training ended."""

    phase: str
    epoch: Epoch
    epochs: int
    steps: int


Event = (
    Warned
    | Noted
    | Doing
    | StageBegun
    | Outlined
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
    | Busy
    | EpochEnded
)
Progress = Callable[[Event], None]


def unheard(event: Event) -> None:
    """A progress function that drops every event."""
