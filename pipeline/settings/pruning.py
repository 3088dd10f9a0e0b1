"""Settings of the method: the scan, which weights are pruned, the target of a run and where it begins."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.settings.base import Count, Density, Fraction, Positive, Section, Text


class Scan(Section):
    """The sensitivity scan: each tensor pruned alone, no retraining (figure 6)."""

    mode: Literal["grid", "adaptive"] = Field(
        "grid",
        description="grid measures every one of `levels`; adaptive the largest, middle and smallest of them, then "
        "halfway (in the logarithm of the density) between neighbours whose drops differ by more than `tolerance`.",
    )
    levels: Annotated[tuple[Density, ...], Field(min_length=1, max_length=1000)] = Field(
        (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01),
        description="Densities at which each tensor is tried, falling.",
    )
    samples: Positive | None = Field(None, description="Number of val samples to use; by default all of them.")
    tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="adaptive: neighbouring levels whose drops differ by more than this get a level between them."
    )
    max_levels: Annotated[int, Field(ge=3, le=200)] = Field(10, description="adaptive: levels of a tensor, at most.")
    interval: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Racing: a level is measured only until the 95% interval of its drop reaches no further than this "
        "to either side; by default on all samples.",
    )
    hopeless: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="Racing: a level is also done when it has surely lost more than this share of the accuracy."
    )
    together: Annotated[tuple[Density, ...], Field(max_length=100)] = Field(
        (0.8, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01),
        description="prune.allocation=budget: densities of all weights, falling, at which tensors are also pruned "
        "together, to learn how their damages add up. [] measures none.",
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.01, description="The drop in val accuracy, the same for all tensors, at which a tensor's quality is read off."
    )
    bn_samples: Count = Field(
        0,
        description="Batch norm: at each level the running statistics are estimated again from so many train samples, "
        "without augmentation; 0 leaves the dense network's.",
    )

    @model_validator(mode="after")
    def _falling(self) -> Scan:
        for name, given in (("levels", self.levels), ("together", self.together)):
            if list(given) != sorted(set(given), reverse=True):
                raise ValueError(f"{name} must fall, each once: 0.5, 0.2, 0.1")
        return self


class Prune(Section):
    """Which weights are pruned, and when."""

    criterion: Text = Field(
        "magnitude",
        description="How weights are scored; the highest are kept: magnitude; taylor (|w g|, g the loss's gradient); "
        "obs (the error of the layer's output after the other weights compensate); probabilistic (drawn with chances "
        "in proportion to |w|); random.",
    )
    statistics_samples: Positive = Field(
        1000,
        description="taylor, obs: train samples, without augmentation, that statistics are measured on; no "
        "more than there are.",
    )
    allocation: Text = Field(
        "paper",
        description="How a budget becomes a density for each tensor: paper (|w| / (quality x std), one threshold), "
        "pooled, uniform, erk, explicit, budget (the least rise of the loss that the scan predicts).",
    )
    densities: dict[Text, Density] = Field(
        default_factory=dict,
        description="explicit: density for each tensor, by name or pattern (fc*.weight); with pattern channels, the "
        "share of channels of each group, as `secateur plan` names them.",
    )
    pattern: Text = Field(
        "weights",
        description="The pattern that pruned weights form: weights (each is pruned on its own); channels (whole "
        "channels, each from all tensors that it goes through: what is left is a smaller network); n:m as "
        "in 2:4 (at most 2 of 4 inputs that follow one another are kept, from round 1 on), which a GPU of compute "
        "capability 8 or more can make use of.",
    )
    schedule: Text = Field(
        "geometric",
        description="How the density falls over the rounds: one-shot, geometric (by the same factor in each), cubic "
        "(most of it early), list.",
    )
    rounds: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="Rounds of prune and retrain (geometric, cubic); target.mode=no-loss has target.max_rounds."
    )
    list: Annotated[tuple[Density, ...], Field(max_length=1000)] = Field(
        (), description="schedule list: the density after each round."
    )
    sigma: Literal["first", "renewed"] = Field(
        "first",
        description="paper: first takes each layer's std from the dense weights, renewed from those kept so far.",
    )
    include: tuple[Text, ...] = Field(
        ("*",), description="Patterns of whole tensor names (fc1.weight, features.*) that may be pruned."
    )
    exclude: tuple[Text, ...] = Field((), description="Patterns of whole tensor names (*.fc.weight) that stay dense.")
    min_weights: Count = Field(
        1, description="Weights that every tensor keeps at the least; with pattern channels, channels of each group."
    )
    floors: dict[Text, Fraction] = Field(
        default_factory=dict, description="The least density of a tensor, in every round, by name or pattern."
    )
    ceilings: dict[Text, Density] = Field(
        default_factory=dict,
        description="The largest density of a tensor, from round 1 on, by name or pattern; one that equals the floor "
        "fixes the density. Because of ceilings, rounds before the last may keep fewer weights than planned.",
    )
    survivors: Literal["keep", "reinitialise"] = Field(
        "keep",
        description="keep: retrain the kept weights from the values that they have; reinitialise: from a network "
        "initialised anew in each round, with the pruned network's pattern of zeros (the paper's control).",
    )
    bn_samples: Count = Field(
        0,
        description="Batch norm: after each prune, before retraining, the running statistics are estimated again from "
        "so many train samples, without augmentation; 0 leaves them as they are.",
    )
    reconstruct_samples: Count = Field(
        0,
        description="Reconstruction after each prune, before retraining: layer by layer, kept weights and biases are "
        "set by least squares so that on so many train samples the layer gives what it gave before the prune. It needs "
        "no labels; 0 leaves it out.",
    )
    dead_neurons: bool = Field(
        False,
        description="Also remove, in each round, the connections of units that have no input or no output left "
        "(section 3.5); the constants that they add go into the next bias. The size may fall below the target; with "
        "gradual, as many other weights are kept instead.",
    )
    gradual: Fraction = Field(
        0.0,
        description="Share of a round's updates over which weights are pruned gradually, most of them early (Zhu and "
        "Gupta 2017); the later updates only train the kept weights. 0 prunes all before the first update.",
    )
    gradual_every: Positive = Field(100, description="gradual: updates from one prune to the next.")
    shrink_between_rounds: bool = Field(
        False,
        description="pattern channels: each round retrains a network that has only the channels which are left, and "
        "so is faster; all files of the run still have the whole one. With compile=true each round compiles its own.",
    )
    dense_control: bool = Field(
        True, description="Also train the dense network further for the same steps: the reference of the verdict."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        if self.reconstruct_samples and self.survivors == "reinitialise":
            raise ValueError(
                f"reconstruct_samples={self.reconstruct_samples} is of no use with survivors=reinitialise, which "
                "replaces the network: leave one out"
            )
        if self.gradual and self.shrink_between_rounds:
            raise ValueError(
                f"gradual={self.gradual:g} prunes during the retraining, and shrink_between_rounds=true retrains what "
                "the prune before it left: leave one of the two out"
            )
        if self.gradual and self.reconstruct_samples:
            raise ValueError(
                f"reconstruct_samples={self.reconstruct_samples} repairs what a prune did before the retraining, and "
                f"gradual={self.gradual:g} prunes during it: leave one of the two out"
            )
        return self


class Target(Section):
    """The target of the run."""

    mode: Literal["compression", "thresholds", "no-loss"] = Field(
        "compression",
        description="compression: reach target.compression; thresholds: the paper's quality x std as they are, "
        "which decide the size; no-loss: prune while the drop on val is within `tolerance`, and undo rounds beyond it.",
    )
    compression: Annotated[float, Field(ge=1.0)] | None = Field(
        12.0,
        description="Prunable weights over kept weights; or FLOPs or bytes, see `budget`. no-loss: where to stop even "
        "if more could be pruned; null, the default there, sets no such end.",
    )
    step: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5,
        description="no-loss: the share of the previous round's weights that a round keeps. A round that is undone is "
        "tried again with half the step (the square root of this share), and later rounds keep the smaller step.",
    )
    smallest_step: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.95, description="no-loss: the run ends where the next step would keep more than this share."
    )
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None,
        description="no-loss: the drop in val accuracy against the dense network, paired by image, that a round may "
        "cost (0.003 = 0.3 points); by default `margin`.",
    )
    confidence: Annotated[float, Field(ge=0.5, lt=1.0)] = Field(
        0.95,
        description="no-loss: a round is accepted if the drop is within `tolerance` with this confidence (the upper "
        "end of its one-sided interval); 0.5 takes the measured drop as it is.",
    )
    max_rounds: Annotated[int, Field(ge=1, le=1000)] = Field(16, description="no-loss: accepted rounds, at the most.")
    budget: Literal["weights", "flops", "bytes", "latency"] = Field(
        "weights",
        description="What target.compression, and the density of each round, count in the prunable tensors: weights; "
        "with allocation=budget also flops (of one sample) or bytes (predicted, packed), with pattern=channels flops "
        "or latency (of a pass of the whole network).",
    )
    latency_ms: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="budget=latency: the milliseconds that a pass of the small network is to take; it stands in place "
        "of `compression`.",
    )
    latency_table: Text | None = Field(
        None,
        description="budget=latency: a table that `secateur bench --table` wrote, on this device or another; by "
        "default each run measures its own.",
    )
    latency_device: Text | None = Field(
        None,
        description="budget=latency: the device that latency_table is of, where that is not the one of this run.",
    )
    latency_batch: Annotated[int, Field(ge=1, le=2**20)] = Field(
        1, description="budget=latency: samples of the pass whose time counts."
    )
    margin: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.003,
        description="The verdict is `no loss` if the upper 95% bound of the drop is within this (0.003 = 0.3 points).",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_end(cls, values: Any) -> Any:
        """no-loss goes as far as it can unless it is told otherwise."""
        no_loss = isinstance(values, dict) and values.get("mode") == "no-loss"
        return {"compression": None, **values} if no_loss else values

    @model_validator(mode="after")
    def _consistent(self) -> Target:
        if self.compression is None and not self.no_loss:
            raise ValueError(f"compression=null: mode={self.mode} needs a number, as in 12")
        if self.step > self.smallest_step:
            raise ValueError(
                f"step={self.step:g} keeps more than smallest_step={self.smallest_step:g}: no round would be tried; "
                "lower step"
            )
        return self

    @property
    def no_loss(self) -> bool:
        """Whether rounds are judged on val, and undone if they lose too much; sizes depend on earlier rounds."""
        return self.mode == "no-loss"

    @property
    def by_thresholds(self) -> bool:
        """Whether no budget is given: the size follows from the paper's thresholds."""
        return self.mode == "thresholds"

    @property
    def to_size(self) -> bool:
        """Whether the run ends at target.compression."""
        return self.mode == "compression"

    @property
    def final_density(self) -> float:
        """Kept over prunable weights at the end of the run."""
        assert self.compression is not None, "no-loss finds its own"
        return 1.0 / self.compression

    @property
    def allowed(self) -> float:
        """no-loss: the drop on val that a round may cost, a fraction."""
        return self.margin if self.tolerance is None else self.tolerance


class Start(Section):
    """Where the first round begins."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: Text | None = Field(
        None,
        alias="from",
        description="RUN:ROUND, an accepted round of another run, which this one prunes further. RUN is a name under "
        "runs_dir, a path or a URL; ROUND follows the last colon, 0 is the dense network. Data, network, seed and "
        "dense training must be given as in the other run. By default a run trains its own dense network.",
    )

    @model_validator(mode="after")
    def _has_round(self) -> Start:
        if self.source is not None:
            run, colon, number = self.source.rpartition(":")
            if not (colon and run and number.isascii() and number.isdigit() and len(number) < 5):
                raise ValueError(f"from={self.source} is not RUN:ROUND, as in lenet-300-100:3")
        return self

    @property
    def run(self) -> str:
        """The other run, as it was given."""
        assert self.source is not None
        return self.source.rpartition(":")[0]

    @property
    def round(self) -> int:
        """The other run's round; 0 is its dense network."""
        assert self.source is not None
        return int(self.source.rpartition(":")[2])
