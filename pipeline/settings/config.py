"""Every setting, typed and frozen: defaults, then a YAML file, then `a.b=c` overrides."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.hiding import hide
from pipeline.settings.base import Section, Text, is_default, short
from pipeline.settings.cluster import Cluster, Tracking, asked
from pipeline.settings.data import Data
from pipeline.settings.export import Export
from pipeline.settings.model import Model
from pipeline.settings.pruning import Prune, Scan, Start, Target
from pipeline.settings.training import Retrain, Train
from pipeline.settings.yaml_file import read_tree

_INSTEAD = (
    "config.yaml, the report and MLflow would repeat it. Leave it out, and set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD for a tracking server (PGPASSWORD for a database), or give s3:// with AWS credentials"
)


# Settings that were added when runs existed already: see `hashed`.
ADDED = (
    "prune.pattern", "task", "model.checkpoint_key", "model.trained", "data.follow_links", "cluster.hang_seconds",
    "data.decoder", "reproducible", "dense.accumulate", "retrain.accumulate",
    "eval_precision", "exchange_precision", "compile", "export.codebook_bits", "export.codebook_epochs",
    "target.latency_ms", "target.latency_table", "target.latency_device", "target.latency_batch",
    "prune.shrink_between_rounds",
)  # fmt: skip
# What such a setting stands at in a run that is older than it, where that is not its default.
EARLIER = {"data.decoder": "pillow"}
# Settings that change no result, and no fingerprint.
UNHASHED = (
    "dense.checkpoint_minutes", "retrain.checkpoint_minutes", "data.build_workers", "data.decoded_cache",
    "data.decoded_cache_bytes", "model.licence", "tracking.register", "tracking.models", "tracking.system_metrics",
)  # fmt: skip


class Config(Section):
    """One run, from data to report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="Name of the run, and of its folder under runs_dir."
    )
    runs_dir: Text = Field(
        "runs", description="Folder that holds runs, a path or s3://bucket/prefix; shared and absolute on a cluster."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(0, description="The one seed of all random draws.")
    threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        1, description="torch's threads in each process; the last bits of sums depend on it."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where the process has one.")
    reproducible: bool = Field(
        True,
        description="The same bits each time on one kind of machine. false: on a GPU also algorithms that add in any "
        "order, cuDNN's choice by trial, and TF32, which are faster.",
    )
    compile: bool = Field(
        False,
        description="Trainings run through torch.compile, which takes a minute or so at first and is faster on a GPU. "
        "It needs a C++ compiler on the workers. Masks stay outside, so all rounds use one compiled network.",
    )
    eval_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of forward passes in evaluation and scan; bf16 is faster on a GPU."
    )
    exchange_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Precision in which several workers exchange gradients; bf16 halves the bytes and rounds each "
        "gradient to 8 bits of mantissa.",
    )
    data: Data = Field(default_factory=lambda: Data.model_validate({}))
    model: Model = Field(default_factory=lambda: Model.model_validate({}))
    task: Text = Field("classification", description="What is learnt: classification of images.")
    dense: Train = Field(default_factory=lambda: Train.model_validate({}), description="Training of the dense network.")
    scan: Scan = Field(default_factory=lambda: Scan.model_validate({}))
    prune: Prune = Field(default_factory=lambda: Prune.model_validate({}))
    retrain: Retrain = Field(
        default_factory=lambda: Retrain.model_validate({}), description="Retraining in each round."
    )
    target: Target = Field(default_factory=lambda: Target.model_validate({}))
    export: Export = Field(default_factory=lambda: Export.model_validate({}))
    start: Start = Field(default_factory=lambda: Start.model_validate({}))
    cluster: Cluster = Field(default_factory=lambda: Cluster.model_validate({}))
    tracking: Tracking = Field(default_factory=lambda: Tracking.model_validate({}))

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, values: Any) -> Any:
        """Settings are kept in config.yaml, the report and MLflow, so none may hold a secret."""
        for name, value in leaves(values).items():
            if hide(str(value)) != str(value):
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
        if self.prune.gradual and self.target.by_thresholds:
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
        if self.target.budget != "weights" and self.start.source is not None:
            raise ValueError(
                f"target.budget={self.target.budget} counts from the dense network, and start.from="
                f"{self.start.source} is another beginning: leave one of the two out"
            )
        if self.target.budget == "bytes" and self.export.codebook_bits:
            raise ValueError(
                "target.budget=bytes prices weights of four bytes, and export.codebook_bits stores fewer: leave one of "
                "the two out"
            )
        if self.cluster.max_workers > self.data.lanes:
            raise ValueError(
                f"cluster.workers={asked(self.cluster.workers)} is more than data.lanes={self.data.lanes}: a worker "
                "would have no samples; raise data.lanes"
            )
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and merge `a.b=c` overrides into it.

    Raises UserError with the setting, its value and the remedy.
    """
    return parse_config(read_tree(path, overrides or []), origin=f"config '{path}'")


def load_begun(path: str | Path) -> Config:
    """Read the config.yaml of a run's folder. A setting that is newer than the run is as the run had it.

    Raises UserError as `load_config` does.
    """
    tree = read_tree(path, [])
    for setting, value in EARLIER.items():
        *parents, leaf = setting.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):  # else it is refused below
            node.setdefault(leaf, value)
    return parse_config(tree, origin=f"config '{path}'")


def parse_config(values: Any, origin: str = "config") -> Config:
    """Validate a tree of plain values. Raises UserError that lists every setting that is wrong."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(lines)) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML text, every setting present."""

    def literal(value: Any) -> Any:
        """The value with `${` escaped, which OmegaConf would resolve. Real interpolations are resolved before."""
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


def hashed(config: Config) -> dict[str, Any]:
    """The settings that fingerprints are computed from. One in ADDED is left out where it is as in older runs.

    So a run that is older than such a setting keeps its fingerprints. Those in UNHASHED are always left out.
    """
    tree = config.model_dump(mode="json")
    for setting in (*ADDED, *UNHASHED):
        *parents, leaf = setting.split(".")
        section: Any = config
        node = tree
        for parent in parents:
            section, node = getattr(section, parent), node[parent]
        as_before = node[leaf] == EARLIER[setting] if setting in EARLIER else is_default(section, leaf)
        if setting in UNHASHED or as_before:
            del node[leaf]
    return tree


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return leaves(config.model_dump(mode="json"))


def leaves(tree: Any) -> dict[str, Any]:
    """The values in a tree of mappings, by dotted name."""
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
    return f"{where}={short(problem['input'])}: {message[0].lower()}{message[1:]}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    fields: dict[str, FieldInfo] = Config.model_fields
    for part in loc[:-1]:
        annotation = fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        fields = annotation.model_fields
    return [field.alias or name for name, field in fields.items()]
