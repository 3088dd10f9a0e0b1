"""The documents of a run's folder as records: writers and readers of a document share its type.

Numbers of top1, top5, drops and densities are fractions in 0..1; losses are in nats; `..._ms` are milliseconds since
1970. A document that only one module writes and reads (checkpoints' manifests, the lease) has its type in that module.
result.json's type is in `result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.base.record import Record, optional

CHANNELS = "channels"  # the kind of a group of channels in scan.json


@dataclass(frozen=True)
class RunFacts(Record):
    """run.json: which run this is."""

    uid: str
    name: str
    created_ms: int
    version: str | None = optional()  # of secateur, when it was begun


@dataclass(frozen=True)
class Ended(Record):
    """ended.json: how the last process that drove the run ended, where that was before the run's end.

    It is "killed" by Ctrl-C or SIGTERM, "failed" by any error, which `why` tells. One that got no time to write it, as
    by kill -9, leaves none.
    """

    how: Literal["killed", "failed"]
    why: str
    ms: int


@dataclass(frozen=True)
class NoOnnx(Record):
    """final/no-onnx.json: why the final network has no ONNX form, by which torch."""

    why: str
    torch: str


@dataclass(frozen=True)
class DataFacts(Record):
    """data.json: samples of each split, the size of the label space, the classes that have samples, and which data.

    `data` is the identity of the shards (`Manifest.identity`), here and in all other documents; older ones lack it.
    """

    train: int
    test: int
    val: int
    classes: int
    present: int
    source: str
    root: str | None
    bad: dict[str, str] = field(default_factory=dict)
    data: str | None = optional()


@dataclass(frozen=True)
class StageMarker(Record):
    """STAGE/finished.json, written last: what the stage was made from (a fingerprint) and how long it took."""

    made_from: str
    seconds: float
    finished_ms: int = 0


@dataclass(frozen=True)
class Evaluation(Record):
    """How a network answers a split: right answers and loss. top1_present looks at the classes that have samples."""

    top1: float
    top5: float | None
    loss: float
    top1_present: float | None = None


@dataclass(frozen=True)
class Epoch(Record):
    """One epoch of a training. `order` is a digest of which samples were seen at which step.

    `images_per_s` are those of all ranks, without evaluation; `waiting` is the share (0 to 1) of rank 0's time in which
    it waited for data. Both are of the epoch's last process, and older epochs lack them.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    val_top1: float
    order: str
    seconds: float
    images_per_s: float | None = optional()
    waiting: float | None = optional()


@dataclass(frozen=True)
class DenseMetrics(Record):
    """dense/metrics.json and rounds/control.json: a training of the dense network, and how it ended."""

    val: Evaluation
    history: tuple[Epoch, ...]
    seconds: float
    finished_ms: int = 0
    data: str | None = optional()


@dataclass(frozen=True)
class Prediction(Record):
    """The scan's prediction for a plan's counts before retraining: the rise of the loss (nats).

    `least` is the least that any allocation within the same limits could have for the same cost; `budget` and `spent`
    count in `unit`; `power` and `scale` say how the damages of single tensors were composed, which older plans lack.
    """

    unit: str
    budget: int
    spent: int
    rise: float
    least: float
    power: float | None = None
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class TensorPlan(Record):
    """What one tensor is to keep, and the score below which its weights are pruned.

    `dead` counts the weights that were removed because their unit is dead; `keep` is what is left after that.
    """

    name: str
    weights: int
    keep: int
    dead: int = 0  # older plans lack it
    threshold: float | None


@dataclass(frozen=True)
class GroupPlan(Record):
    """How many of a group's channels are to stay; the group has the name of its first tensor."""

    name: str
    units: int
    keep: int


@dataclass(frozen=True, kw_only=True)
class RoundPlan(Record):
    """rounds/NN/plan.json: the exact counts of an attempt at a round (from 1), fixed before anything is trained.

    `budget` is the weights that all tensors keep together. `predicted` is None without a scan. `groups` is empty unless
    whole channels are pruned. Older plans lack the fields with defaults.
    """

    round: int
    attempt: int = 1
    planned_density: float
    budget: int
    predicted: Prediction | None = None
    tensors: tuple[TensorPlan, ...]
    groups: tuple[GroupPlan, ...] = ()

    @property
    def keep(self) -> dict[str, int]:
        """The weights that each tensor keeps, by name."""
        return {tensor.name: tensor.keep for tensor in self.tensors}

    @property
    def dead(self) -> int:
        """How many weights of all tensors were removed because their units are dead."""
        return sum(tensor.dead for tensor in self.tensors)

    def without_dead(self, left: Mapping[str, int]) -> RoundPlan:
        """The plan after dead units were removed; the argument has the weights that each tensor has left."""
        tensors = tuple(
            replace(tensor, keep=left[tensor.name], dead=tensor.keep - left[tensor.name]) for tensor in self.tensors
        )
        return replace(self, tensors=tensors, budget=sum(left.values()))


@dataclass(frozen=True)
class Timed(Record):
    """A network that keeps so many channels of each group: ms of a forward pass, and of each step alone (medians)."""

    keep: dict[str, int]
    ms: float
    steps: dict[str, float]


@dataclass(frozen=True)
class LatencyTable(Record):
    """latency/table.json, or a file that `secateur bench --table` wrote: how long networks of some widths take.

    `network` is a hash of the steps and their widths, without weights; `batch` is the samples of a pass. The first of
    `timed` is the whole network.
    """

    device: str
    batch: int
    network: str
    timed: tuple[Timed, ...]


@dataclass(frozen=True)
class BeforeRetraining(Record):
    """A pruned network's answers on val before it was retrained."""

    top1: float
    loss: float


@dataclass(frozen=True)
class LayerCount(Record):
    """The kept weights of one tensor, counted from its mask."""

    name: str
    weights: int
    kept: int
    density: float


@dataclass(frozen=True)
class Judgement(Record):
    """A round's paired drop on val against the dense network; `drop_high` is what it may really be."""

    drop: float
    drop_high: float
    only_dense_right: int
    only_pruned_right: int
    samples: int


@dataclass(frozen=True)
class Fit(Record):
    """The squared error of a layer's outputs relative to the error of output 0, with the masked and the new weights."""

    name: str
    masked: float
    reconstructed: float


@dataclass(frozen=True, kw_only=True)
class RoundMetrics(Record):
    """rounds/NN/metrics.json: what an attempt at a round measured. Counts come from the masks, not from the plan.

    Older metrics lack the fields with defaults.
    """

    round: int
    attempt: int = 1
    planned_density: float
    density: float
    compression: float
    kept: int
    weights: int
    val_before_retrain: BeforeRetraining
    val: Evaluation
    mask_digest: str
    layers: tuple[LayerCount, ...]
    accepted: bool = True
    dead: int = 0
    dropout: dict[str, float] = field(default_factory=dict)
    reconstruction: tuple[Fit, ...] = ()
    history: tuple[Epoch, ...]
    steps: int
    seconds: float
    finished_ms: int = 0
    against_dense: Judgement | None = optional()  # in a campaign without loss
    data: str | None = optional()


@dataclass(frozen=True)
class SharedTensor(Record):
    """A tensor with shared values: so many `weights` (those kept) take `values` values, which `bits` allow."""

    name: str
    bits: int
    values: int
    weights: int


@dataclass(frozen=True, kw_only=True)
class CodebookMetrics(Record):
    """rounds/codebook/metrics.json: the network whose values are shared.

    `val_before` is of the last round's network, `val_shared` after k-means, `val` after the fine-tuning.
    """

    val_before: Evaluation
    val_shared: Evaluation
    val: Evaluation
    tensors: tuple[SharedTensor, ...]
    history: tuple[Epoch, ...]
    steps: int
    seconds: float
    finished_ms: int = 0
    data: str | None = optional()


@dataclass(frozen=True)
class Ancestor(Record):
    """A run that a branch descends from, and the round at which the branch left it."""

    run: str
    uid: str
    round: int


@dataclass(frozen=True)
class StartFacts(Record):
    """start/start.json: where a branch begins, whom it descends from, and the recipe of each round before it."""

    run: str
    path: str
    uid: str
    round: int
    generation: int
    weights: int
    kept: int
    density: float
    compression: float
    mlflow_run_id: str | None
    ancestors: tuple[Ancestor, ...]
    retrain: tuple[dict[str, Any], ...]  # settings of `retrain`, which `Retrain` validates


@dataclass(frozen=True)
class TestMetrics(Record):
    """final/test.json: the results of the one evaluation on test."""

    samples: int
    dense: Evaluation
    pruned: Evaluation
    dense_control: Evaluation | None = optional()
    largest_class: float | None = optional()  # its share of the samples: what always naming one class gets right
    data: str | None = optional()


@dataclass(frozen=True)
class LayerActivity(Record):
    """A row of final/activity.json: shares of non-zero values in what a layer gives and reads, and where measured.

    The shares are None where they were not measured.
    """

    name: str
    output_density: float | None
    input_density: float | None
    measured: str


@dataclass(frozen=True)
class WeightHistogram(Record):
    """A tensor's weights before pruning and, of those kept, after (figure 7)."""

    name: str
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Histograms(Record):
    """final/histograms.json."""

    tensors: tuple[WeightHistogram, ...]


@dataclass(frozen=True, kw_only=True)
class Difference(Record):
    """A network's answers compared with the dense network's answers to the same samples.

    `drop` is top1 of the dense network minus this one's, `rise` the loss of this one minus the dense network's, each
    with its paired 95% interval (None from one sample alone). `top1` and `loss` are the dense network's on all
    samples, less the drop and plus the rise; where all samples were measured, they are what was measured. low and high
    are top1's own interval (Wilson), not paired.
    """

    samples: int
    top1: float
    low: float
    high: float
    drop: float
    drop_low: float
    drop_high: float
    loss: float
    rise: float
    rise_low: float | None
    rise_high: float | None


@dataclass(frozen=True, kw_only=True)
class Level(Difference):
    """The network with one tensor, or one group of channels, at one density.

    `density` is kept / alive, `absolute` kept / weights; they differ only after a round. quality = threshold / std of
    the tensor (paper section 3). `method` is how the forward passes of levels were shared.
    """

    density: float
    kept: int
    absolute: float
    quality: float
    method: str


@dataclass(frozen=True, kw_only=True)
class Joint(Difference):
    """The network with all tensors pruned together, to `keep` weights (or groups, to channels): of scan/together."""

    keep: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TogetherRow(Joint):
    """A row of scan.json's `together`: the density of all weights, and the power by which damages were composed."""

    density: float
    power: float


@dataclass(frozen=True)
class ScanOrigin(Record):
    """What a scan's numbers come from: hashes of weights and data, and the settings that change them."""

    weights: str
    data: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Figures(Record):
    """A network's answers to `samples` samples.

    low and high are top1's 95% interval (Wilson); None where the figures are those of another machine's scan.json.
    """

    top1: float
    loss: float
    samples: int
    low: float | None = optional()
    high: float | None = optional()


@dataclass(frozen=True)
class Finding(Record):
    """A line of scan/levels: a level of a tensor, or the figures of the dense network."""

    tensor: str | None = optional()
    level: Level | None = optional()
    dense: Figures | None = optional()


@dataclass(frozen=True)
class Trials(Record):
    """scan/trials.json of older runs: the levels measured so far, by tensor, in the order in which they were measured.

    `dense` is None until the network itself is measured.
    """

    made_of: ScanOrigin
    dense: Figures | None
    levels: dict[str, list[Level]]


@dataclass(frozen=True)
class JointTrials(Record):
    """scan/together.json of older runs: what was measured so far with all tensors pruned together."""

    made_of: ScanOrigin
    rows: tuple[Joint, ...]


@dataclass(frozen=True)
class TensorScan(Record):
    """One tensor's curve; `quality` is the largest whose drop stays within delta (paper section 3).

    Where whole channels are pruned it is a group's: `kind` is "channels", `weights` and `alive` count channels, and
    sigma and quality are 0, since a group has no threshold of single weights.
    """

    name: str
    kind: str
    weights: int
    alive: int
    sigma: float
    method: str
    levels: tuple[Level, ...]
    quality: float

    @property
    def of_channels(self) -> bool:
        """Whether it is of a group of channels."""
        return self.kind == CHANNELS


@dataclass(frozen=True)
class DenseFigures(Record):
    """The network that was scanned, on all samples."""

    top1: float
    loss: float


@dataclass(frozen=True)
class Scan(Record):
    """scan/scan.json, or scan/after-N.json with `after` = N. Two scans of one `made_of`, whose hash is `key`, join."""

    samples: int
    split: str
    dense: DenseFigures
    delta: float
    tensors: tuple[TensorScan, ...]
    after: int | None
    key: str
    made_of: ScanOrigin
    together: tuple[TogetherRow, ...] | None = optional()
    data: str | None = optional()
