"""Every setting, typed and frozen: defaults, then a YAML file, then `a.b=c` overrides."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pipeline.config_file import read_tree
from pipeline.data import storage
from pipeline.errors import UserError

LARGEST = 10**9  # of a count: what is larger is a slip, and would only end in memory or time that nobody has


def _printable(text: str) -> str:
    if len(text) > 2000 or not text.isprintable():
        raise ValueError("has characters that cannot be printed, or more than 2,000")
    return text


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments are stored with the run: what JSON can hold, and is equal to itself."""

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                check(key)
                check(inner)
        elif isinstance(value, list):
            for inner in value:
                check(inner)
        elif isinstance(value, str):
            _printable(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"holds {value}, which cannot be written to JSON: set it in the factory")
        elif not isinstance(value, int | float | None):
            raise ValueError(f"holds a {type(value).__name__}: give numbers, text, lists and mappings")

    check(values)
    return values


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Density = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Bytes = Annotated[int, Field(ge=1, le=2**60)]
Text = Annotated[str, AfterValidator(_printable)]


_INSTEAD = (
    "config.yaml, the report and MLflow would repeat it. Leave it out, and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD for a tracking server (PGPASSWORD for a database), or give s3:// with AWS credentials"
)
NO_ROOT = "source '{}' reads from data.root, which is not set: add data.root=PATH"


class Section(BaseModel):
    """A group of settings; frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """`epochs: yes` would become 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            kind = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if kind is bool or name == "kwargs" or (isinstance(kind, type) and issubclass(kind, Section)):
                continue
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            if any(isinstance(item, bool) for item in items):
                raise ValueError(f"{name}={_short(value)} is true or false (as yes, no, on and off are): give a value")
        return values


class Data(Section):
    """Where images come from and how they become batches."""

    source: Literal["digits", "idx", "folder", "imagenet", "shards"] = Field(
        "digits",
        description="digits: scikit-learn's 1,797 real digits, nothing to download; idx: files of the MNIST family, "
        ".gz or not; folder: train/<class>/* and val or test/<class>/*, a folder or one tar; imagenet: a folder of "
        "ILSVRC 2012's original tars, unpacked or not, whose val is our test; shards: WebDataset shards with a "
        "manifest.json (`secateur shards build` or `index`).",
    )
    root: Text | None = Field(None, description="Folder, tar or URL that the source reads; not used by digits.")
    classes: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        None, description="Number of classes; by default what the source holds."
    )
    class_index: Text | None = Field(
        None, description="JSON file {index: [folder name, title]} that numbers class folders, as ImageNet's does."
    )
    label: Text = Field("cls", description="Where a foreign shard keeps the label: cls, or the name of a json field.")
    channels: Literal[1, 3] = Field(1, description="1 reads every image as greyscale, 3 as RGB.")
    resize: Positive | None = Field(None, description="Short side, in pixels, an image is brought to when decoded.")
    size: Annotated[int, Field(ge=1, le=8192)] = Field(
        28, description="Height and width, in pixels, of the network's input (centre crop)."
    )
    mean: tuple[float, ...] = Field((0.0,), description="Per channel, subtracted after scaling pixels to 0..1.")
    std: tuple[float, ...] = Field((1.0,), description="Per channel, divided by after the mean is taken off.")
    augment: tuple[Literal["shift", "crop", "resized-crop", "flip"], ...] = Field(
        (),
        description="Training only, drawn from (seed, epoch, sample). shift: move by up to `shift` pixels, zeros come "
        "in; crop: a random window of `size`; resized-crop: area 8-100%, aspect 3/4-4/3; flip: left-right.",
    )
    shift: Count = Field(2, description="Largest move of the `shift` augmentation, in pixels.")
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Share of train held out as val, drawn by seed and stratified by class."
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="digits only, which comes without a test part: the share held out as test."
    )
    shard_samples: Positive = Field(5000, description="Samples in a shard that `shards build` writes.")
    shrink: Positive | None = Field(
        None, description="Short side, in pixels, that `shards build` brings larger images down to, as JPEG."
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(90, description="JPEG quality of the images `shrink` writes.")
    lanes: Annotated[int, Field(ge=1, le=2**16)] = Field(
        8,
        description="Fixed number of parallel streams an epoch is cut into; the order depends on it, never on the "
        "number of workers. At least as many as workers.",
    )
    shuffle_bytes: Bytes = Field(
        16 * 2**20, description="Memory of a lane's shuffle window: how far a sample can move from its stored place."
    )
    cache_bytes: Annotated[int, Field(ge=0, le=2**60)] = Field(
        2**30,
        description="A split whose decoded images fit is decoded once and kept in memory; else it streams. "
        "The order is the same.",
    )
    cache_dir: Text | None = Field(
        None, description="Folder on each node's own disk that keeps shards read from a URL; by default none is kept."
    )
    cache_disk_bytes: Bytes = Field(
        50 * 2**30, description="Size of data.cache_dir on each node; the shards used longest ago are removed."
    )
    decode_threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="Threads that decode images in each process."
    )
    eval_batch: Positive = Field(250, description="Samples a forward pass takes in evaluation.")
    max_bad_fraction: Fraction = Field(0.01, description="More unreadable images than this share stops the run.")

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.source not in ("digits", "imagenet") and self.root is None:
            raise ValueError(NO_ROOT.format(self.source))
        if len(self.mean) not in (1, self.channels) or len(self.std) not in (1, self.channels):
            raise ValueError(f"mean and std take 1 or {self.channels} numbers, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize={self.resize} is smaller than size={self.size}: the crop would not fit")
        if "shift" in self.augment and self.shift > self.size:
            raise ValueError(f"shift={self.shift} moves an image of size={self.size} out of sight: lower it")
        if self.shrink is not None and self.shrink < (self.resize or self.size):
            raise ValueError(
                f"shrink={self.shrink} is smaller than resize (or size), {self.resize or self.size}: images would be "
                "blurred, raise it"
            )
        return self


class Model(Section):
    """The network."""

    factory: Text = Field(
        "lenet_300_100",
        description="lenet_300_100, lenet_5 (Caffe's), alexnet_caffe (two groups), vgg_16, or an import path: "
        "torchvision.models.squeezenet1_1, my_module:build.",
    )
    kwargs: Annotated[dict[str, Any], AfterValidator(_plain)] = Field(
        default_factory=dict, description="Keyword arguments of the factory."
    )
    checkpoint: Text | None = Field(
        None, description="Weights to start from: .safetensors, or .pth/.pt loaded with weights_only."
    )


class Train(Section):
    """How weights are updated, in dense training or in the retraining of a round."""

    epochs: Count = Field(10, description="Passes over train; 0 trains nothing.")
    steps: Positive | None = Field(None, description="Ends a training early, after so many updates.")
    batch_size: Positive = Field(128, description="Samples in an update, over all workers; a multiple of data.lanes.")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd (with momentum) or adamw.")
    lr: Annotated[float, Field(gt=0.0)] = Field(0.1, description="Learning rate at the start (after warm-up).")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="SGD's momentum; AdamW's beta1.")
    nesterov: bool = Field(False, description="Nesterov's form of the momentum (sgd).")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="L2 regularisation of all parameters, biases included, as Caffe does (adamw: decoupled)."
    )
    l1: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="L1 regularisation of the prunable weights, no others. The paper's L1 then L2 is dense.l1 with "
        "retrain.weight_decay.",
    )
    schedule: Literal["constant", "cosine", "step", "inv"] = Field(
        "cosine",
        description="cosine falls to 0; step multiplies by `gamma` at `milestones`; inv is Caffe's "
        "lr*(1 + gamma*step)^-power.",
    )
    warmup_epochs: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Epochs of linear warm-up from 0.")
    milestones: tuple[Fraction, ...] = Field((0.5, 0.75), description="Shares of the training at which `step` falls.")
    gamma: Annotated[float, Field(gt=0.0)] = Field(0.1, description="Factor of `step`, or gamma of `inv`.")
    power: float = Field(0.75, description="Power of `inv`.")
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Of the cross-entropy.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs forward and loss under autocast.")
    channels_last: bool = Field(False, description="Memory format of weights and images, faster on GPUs.")
    checkpoint_steps: Positive = Field(500, description="Updates between checkpoints; one is also kept at each end.")


class Retrain(Train):
    """How survivors are retrained in each round, and the dense control with them."""

    lr: Annotated[float, Field(gt=0.0)] | None = Field(  # type: ignore[assignment]  # see recipe.resolve
        None, description="Learning rate at the start (after warm-up); by default lr_scale * dense.lr, or else 0.01."
    )
    lr_scale: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Learning rate as a factor of dense.lr, instead of lr; the paper's are 0.1 for the LeNets and 0.01 "
        "for AlexNet.",
    )
    dropout_correction: bool = Field(
        False,
        description="The paper's section 3.2: a dropout rate D becomes D*sqrt(kept / all connections) of the layer "
        "whose outputs it drops: 0.5 becomes 0.15 at 9% density. The dense control keeps the dense rates.",
    )
    distill: Fraction = Field(
        0.0,
        description="Share of the loss that compares the outputs with the dense network's on the same images (Hinton "
        "et al. 2015) instead of with the labels. The dense control learns from the dense network too.",
    )
    temperature: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(
        4.0, description="distill: both networks' logits are divided by this before the softmax."
    )
    phases: Annotated[tuple[Literal["fc", "conv", "all"], ...], Field(min_length=1)] = Field(
        ("all",),
        description="Which layers are updated while the others are held fixed, one kind after the other; a round's "
        "steps are shared out equally, what is left over goes to the last. The paper's AlexNet: [fc, conv, all]. A "
        "norm goes with the layer defined before it; the learning rate runs on, momentum starts anew in each phase.",
    )

    @model_validator(mode="after")
    def _one_rate(self) -> Retrain:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError(f"lr={self.lr:g} and lr_scale={self.lr_scale:g} both set the learning rate: leave one out")
        return self


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
    samples: Positive | None = Field(None, description="Uses so many of val's samples; by default all of them.")
    tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.05, description="adaptive: neighbouring levels whose drops differ by more than this get one between them."
    )
    max_levels: Annotated[int, Field(ge=3, le=200)] = Field(10, description="adaptive: levels of a tensor, at most.")
    interval: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Racing: a level is measured on no more samples than it takes until the 95% interval of its drop "
        "reaches no further than this to either side; by default on all samples.",
    )
    hopeless: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.5, description="Racing: a level is also done when it has surely lost more than this share of the accuracy."
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.01, description="The drop in val accuracy, one for all tensors, at which a tensor's quality is read off."
    )
    bn_samples: Count = Field(
        0,
        description="Batch norm: at each level the running statistics are estimated again from so many train samples, "
        "without augmentation; 0 leaves the dense network's.",
    )

    @model_validator(mode="after")
    def _falling(self) -> Scan:
        if list(self.levels) != sorted(set(self.levels), reverse=True):
            raise ValueError("levels must fall, each once: 0.5, 0.2, 0.1")
        return self


class Prune(Section):
    """Which weights go, and when."""

    criterion: Text = Field(
        "magnitude",
        description="Scores for weights, higher keeps: magnitude; taylor (|w g|, g the loss's gradient); obs (the "
        "error of the layer's output after the rest made up for it); probabilistic (drawn with chances in proportion "
        "to |w|); random.",
    )
    statistics_samples: Positive = Field(
        1000,
        description="taylor, obs: train samples, without augmentation, that statistics are measured on; no "
        "more than there are.",
    )
    allocation: Text = Field(
        "paper",
        description="A budget to a density for each tensor: paper (|w| / (quality x std), one threshold), "
        "pooled, uniform, erk, explicit, budget (the least rise of the loss that the scan predicts).",
    )
    densities: dict[Text, Density] = Field(
        default_factory=dict, description="explicit: density for each tensor, by name or pattern (fc*.weight)."
    )
    schedule: Literal["one-shot", "geometric", "cubic", "list"] = Field(
        "geometric", description="How the density falls over the rounds."
    )
    rounds: Annotated[int, Field(ge=1, le=1000)] = Field(
        4, description="Rounds of prune and retrain (geometric, cubic); target.mode=no-loss has target.max_rounds."
    )
    list: Annotated[tuple[Density, ...], Field(max_length=1000)] = Field(
        (), description="schedule list: the density after each round."
    )
    sigma: Literal["first", "renewed"] = Field(
        "first", description="paper: each layer's std from the dense weights, or from the survivors of each round."
    )
    include: tuple[Text, ...] = Field(
        ("*",), description="Patterns of whole tensor names (fc1.weight, features.*) that may be pruned."
    )
    exclude: tuple[Text, ...] = Field((), description="Patterns of whole tensor names (*.fc.weight) that stay dense.")
    min_weights: Count = Field(1, description="Weights that every tensor keeps at the least.")
    floors: dict[Text, Fraction] = Field(
        default_factory=dict, description="The least density of a tensor, in every round, by name or pattern."
    )
    ceilings: dict[Text, Density] = Field(
        default_factory=dict,
        description="The largest density of a tensor, from round 1 on, by name or pattern; one that is equal to its "
        "floor fixes it. Rounds before the last keep less in all than they would, where ceilings ask for it.",
    )
    survivors: Literal["keep", "reinitialise"] = Field(
        "keep",
        description="keep: retrain the survivors from the values that they have; reinitialise: from a network made "
        "anew in each round, of which only the pattern of zeros is the pruned one's (the paper's control).",
    )
    bn_samples: Count = Field(
        0,
        description="Batch norm: after each prune, before retraining, the running statistics are estimated again from "
        "so many train samples, without augmentation; 0 leaves them as they are.",
    )
    reconstruct_samples: Count = Field(
        0,
        description="Reconstruction: after each prune, before retraining, layer by layer, survivors and biases are set "
        "by least squares so that the layer gives, on so many train samples, what it gave before the prune. No labels; "
        "0 leaves it out.",
    )
    dead_neurons: bool = Field(
        False,
        description="Also remove, in each round, the connections of units that have no input or no output left "
        "(section 3.5); what such a unit adds goes into the next bias. The size may fall below the target.",
    )
    gradual: Fraction = Field(
        0.0,
        description="Share of a round's updates over which its weights go little by little, most of them early (Zhu "
        "and Gupta 2017); the others train what is left. 0 prunes all of them before the first update.",
    )
    gradual_every: Positive = Field(100, description="gradual: updates from one prune to the next.")
    dense_control: bool = Field(
        True, description="Also train the dense network on for the same steps: the reference of the verdict."
    )

    @model_validator(mode="after")
    def _list_given(self) -> Prune:
        if self.schedule == "list":
            if not self.list:
                raise ValueError("schedule=list needs prune.list, the density after each round: [0.5, 0.2, 0.1]")
            if list(self.list) != sorted(self.list, reverse=True):
                raise ValueError(f"prune.list={[*self.list]} must fall from round to round")
        if self.reconstruct_samples and self.survivors == "reinitialise":
            raise ValueError(
                f"reconstruct_samples={self.reconstruct_samples} is of no use with survivors=reinitialise, which "
                "replaces the network: leave one out"
            )
        if self.allocation == "explicit" and not self.densities:
            raise ValueError("allocation=explicit needs prune.densities: {fc1.weight: 0.08, ...}")
        if self.gradual and self.reconstruct_samples:
            raise ValueError(
                f"reconstruct_samples={self.reconstruct_samples} mends what a prune did before the retraining, and "
                f"gradual={self.gradual:g} prunes within it: leave one of the two out"
            )
        if self.gradual and self.dead_neurons:
            raise ValueError(
                f"gradual={self.gradual:g} prunes during the retraining, but dead_neurons=true looks for dead units "
                "before it: leave one of the two out"
            )
        return self


class Target(Section):
    """What the run is after."""

    mode: Literal["compression", "thresholds", "no-loss"] = Field(
        "compression",
        description="compression: reach target.compression; thresholds: the paper's quality x std as they are, the "
        "size follows; no-loss: prune as far as the drop on val stays within `tolerance`, and undo what goes beyond.",
    )
    compression: Annotated[float, Field(ge=1.0)] | None = Field(
        12.0,
        description="Prunable weights over kept weights; or FLOPs or bytes, see `budget`. no-loss: where to stop even "
        "if more could go; null, its default there, is no such end.",
    )
    step: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5,
        description="no-loss: the share of the weights that a round keeps of the round before. One that is undone is "
        "tried again with half the step (the square root of this share), and later rounds keep to the smaller step.",
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
    budget: Literal["weights", "flops", "bytes"] = Field(
        "weights",
        description="What target.compression, and the density of each round, count in the prunable tensors: weights; "
        "with allocation=budget also flops (of one sample) or bytes (predicted, packed).",
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
        if self.compression is None and self.mode != "no-loss":
            raise ValueError(f"compression=null: mode={self.mode} needs a number, as in 12")
        if self.step > self.smallest_step:
            raise ValueError(
                f"step={self.step:g} keeps more than smallest_step={self.smallest_step:g}: no round would be tried; "
                "lower step"
            )
        return self

    @property
    def final_density(self) -> float:
        """Kept over prunable weights that the run ends at."""
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
        description="RUN:ROUND, an accepted round of another run, which this one prunes further: a name under "
        "runs_dir, a path or a URL, and after the last colon the round; 0 is its dense network. Data, network, seed "
        "and dense training are the other run's and must be given alike. By default a run trains its own dense one.",
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
        """Its round; 0 is its dense network."""
        assert self.source is not None
        return int(self.source.rpartition(":")[2])


def _workers(value: Any) -> Any:
    """Refuse what is neither a number of workers nor a range, in one sentence instead of one for each."""
    ends = list(value) if isinstance(value, list | tuple) else [value, value]
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 1 <= ends[0] <= ends[1]:
        raise ValueError(
            f"{value!r} is neither a number of workers nor a range of them: give 1 or more, as in 2, or [min, max] "
            "with 1 <= min <= max, as in [2, 8]"
        )
    return value


def _gpus(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"{value:g} GPUs cannot be reserved: give a share below 1, or a whole number")
    return value


Gpus = Annotated[float, Field(ge=0.0), AfterValidator(_gpus)]
Workers = Annotated[Positive | tuple[Positive, Positive], BeforeValidator(_workers)]


class Cluster(Section):
    """What Ray is asked for."""

    address: str | None = Field(None, description="Ray cluster to join: auto, or host:port; by default a local one.")
    workers: Workers = Field(
        1,
        description="Processes that train together: a number, or a range [min, max] of which a training uses as many "
        "as the cluster has room for, and goes on with more or fewer when nodes come or go.",
    )
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = Field(1.0, description="CPUs reserved for each worker.")
    gpus_per_worker: Gpus = Field(0.0, description="GPUs reserved for each worker.")
    cpus_per_trial: Annotated[float, Field(gt=0.0)] = Field(1.0, description="CPUs reserved for each scan trial.")
    gpus_per_trial: Gpus = Field(0.0, description="GPUs, or a share of one, for a trial.")
    placement: Literal["pack", "spread"] = Field(
        "pack", description="pack: workers on as few nodes as hold them; spread: on as many nodes as there are."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="Lost workers that a training survives, those not counted that a preemption notice came before."
    )
    wait_seconds: Annotated[float, Field(gt=0.0)] = Field(
        600.0, description="How long a run waits for room when a node is lost, as for a new one of an autoscaler."
    )
    resize_seconds: Annotated[float, Field(gt=0.0)] = Field(
        60.0,
        description="How often a training with a range of workers looks for room for more; to grow, it starts again "
        "from its last checkpoint.",
    )
    lease_seconds: Annotated[float, Field(ge=1.0)] = Field(
        60.0,
        description="Where runs_dir is on S3: a run whose driver has been silent so long can be taken over by another.",
    )
    ray_logs: bool = Field(False, description="Also show what Ray's own processes print.")

    @property
    def min_workers(self) -> int:
        """The fewest workers that a training goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that a training uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Tracking(Section):
    """MLflow."""

    enabled: bool = Field(True, description="Mirror the run to MLflow.")
    uri: Text | None = Field(
        None, description="Tracking server; by default sqlite in runs_dir/mlflow.db, where runs_dir is no URL."
    )
    experiment: Text = Field("secateur", description="Experiment the run is filed under.")


class Config(Section):
    """One run, from data to report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="Name of the run, and of its folder under runs_dir."
    )
    runs_dir: Text = Field(
        "runs", description="Folder that holds runs, a path or s3://bucket/prefix; shared and absolute on a cluster."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(0, description="The one seed that sets everything.")
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="torch's threads in each process; sums, and so bits, depend on it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where the process has one.")
    data: Data = Field(default_factory=lambda: Data.model_validate({}))
    model: Model = Field(default_factory=lambda: Model.model_validate({}))
    dense: Train = Field(default_factory=lambda: Train.model_validate({}), description="Training of the dense network.")
    scan: Scan = Field(default_factory=lambda: Scan.model_validate({}))
    prune: Prune = Field(default_factory=lambda: Prune.model_validate({}))
    retrain: Retrain = Field(
        default_factory=lambda: Retrain.model_validate({}), description="Retraining in each round."
    )
    target: Target = Field(default_factory=lambda: Target.model_validate({}))
    start: Start = Field(default_factory=lambda: Start.model_validate({}))
    cluster: Cluster = Field(default_factory=lambda: Cluster.model_validate({}))
    tracking: Tracking = Field(default_factory=lambda: Tracking.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, values: Any) -> Any:
        """Settings are kept in config.yaml, the report and MLflow, so none may hold what opens a door."""
        for name, value in leaves(values).items():
            if storage.hide(str(value)) != str(value):
                raise ValueError(f"{name} is a URL with a password or a signature in it: {_INSTEAD}")
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        for part, train in (("dense", self.dense), ("retrain", self.retrain)):
            if train.batch_size % self.data.lanes:
                raise ValueError(
                    f"{part}.batch_size={train.batch_size} must be a multiple of data.lanes={self.data.lanes}: each "
                    "step takes equally many samples from every lane"
                )
        if self.prune.gradual and self.target.mode == "thresholds":
            raise ValueError(
                f"prune.gradual={self.prune.gradual:g} needs a budget to come down to, and target.mode=thresholds has "
                "none: leave one of the two out"
            )
        if self.prune.gradual and not self.retrain.epochs:
            raise ValueError(
                f"prune.gradual={self.prune.gradual:g} prunes between the updates of the retraining, and "
                "retrain.epochs=0 makes none: set one of the two"
            )
        if self.tracking.enabled and self.tracking.uri is None and not storage.is_local(self.runs_dir):
            raise ValueError(
                f"runs_dir={self.runs_dir} cannot hold MLflow's sqlite file, the default of tracking.uri: set "
                "tracking.uri to a server's URL, or tracking.enabled=false"
            )
        if self.target.budget != "weights" and (self.prune.allocation, self.target.mode) != ("budget", "compression"):
            raise ValueError(
                f"target.budget={self.target.budget} needs prune.allocation=budget and target.mode=compression: others "
                "count weights"
            )
        if self.target.budget != "weights" and self.start.source is not None:
            raise ValueError(
                f"target.budget={self.target.budget} counts from the dense network, and start.from="
                f"{self.start.source} is another beginning: leave one of the two out"
            )
        if self.cluster.max_workers > self.data.lanes:
            raise ValueError(
                f"cluster.workers={asked(self.cluster.workers)} is more than data.lanes={self.data.lanes}: a worker "
                "would have no samples; raise data.lanes"
            )
        fixed = "schedule" if self.prune.schedule != "geometric" else "allocation"
        if self.target.mode == "no-loss" and getattr(self.prune, fixed) in ("one-shot", "cubic", "list", "explicit"):
            raise ValueError(
                f"prune.{fixed}={getattr(self.prune, fixed)} fixes densities, which target.mode=no-loss finds itself: "
                f"leave prune.{fixed} out; target.step says how much a round removes"
            )
        return self


def asked(workers: int | tuple[int, int]) -> str:
    """`cluster.workers` as it was written: 2, or [2, 8]."""
    return str(workers if isinstance(workers, int) else list(workers))


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and merge `a.b=c` overrides into it.

    Raises UserError with the setting, its value and the remedy.
    """
    return parse(read_tree(path, overrides or []), origin=f"config '{path}'")


def parse(values: Any, origin: str = "config") -> Config:
    """Validate a tree of plain values. Raises UserError that lists every setting that is wrong."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(lines)) from error


def dump(config: Config) -> str:
    """The resolved config as YAML text, every setting present."""

    def literal(value: Any) -> Any:
        """A value whose texts OmegaConf will not take for interpolations: what was one has been resolved."""
        if isinstance(value, dict):
            return {key: literal(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [literal(inner) for inner in value]
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value

    return OmegaConf.to_yaml(OmegaConf.create(literal(config.model_dump(mode="json"))))


def differences(ours: Config, theirs: Config, ignore: tuple[str, ...] = ()) -> list[str]:
    """Settings that differ, as `a.b: 1 -> 2`, leaving out those under a prefix in `ignore`."""
    before, after = flatten(ours), flatten(theirs)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(key == p or key.startswith(p + ".") for p in ignore)
    ]


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return leaves(config.model_dump(mode="json"))


def leaves(tree: Any) -> dict[str, Any]:
    """What a tree of mappings holds, by dotted names."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = value

    walk("", tree)
    return flat


def _explain(problem: Any) -> str:
    """One sentence for one problem that pydantic found."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"])
        leaf = str(problem["loc"][-1])
        near = difflib.get_close_matches(leaf, known, n=1, cutoff=0.5)
        parent = ".".join(str(part) for part in problem["loc"][:-1])
        hint = f"did you mean '{parent + '.' if parent else ''}{near[0]}'?" if near else f"known: {', '.join(known)}"
        return f"unknown setting '{where}'; {hint}"
    if problem["type"] == "missing":
        return f"setting '{where}' is missing; add {where}=..."
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}={_short(problem['input'])}: {message[0].lower()}{message[1:]}"


def _short(value: Any, most: int = 100) -> str:
    """A value as it can stand in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    fields: dict[str, FieldInfo] = Config.model_fields
    for part in loc[:-1]:
        annotation = fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        fields = annotation.model_fields
    return [field.alias or name for name, field in fields.items()]
