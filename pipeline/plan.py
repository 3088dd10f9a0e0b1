"""What a run would do, worked out without doing it: `secateur plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import cost, models, prepare, rounds, session, state
from pipeline.config import Config
from pipeline.data import placement, shards, sources, storage
from pipeline.errors import UserError
from pipeline.models import LeftOut, Prunable
from pipeline.prune import criteria, round_plan
from pipeline.train import checkpoint, recipe


@dataclass(frozen=True)
class Counts:
    """Samples of each part, and the size of the label space."""

    train: int
    val: int
    test: int
    classes: int


ILSVRC = Counts(1_281_167, 0, 50_000, 1000)  # ImageNet 2012, whose val is our test


@dataclass(frozen=True)
class RoundSize:
    """One round: its density over all prunable weights, and what follows from it."""

    round: int
    density: float
    kept: int
    flops: int
    bytes: int
    steps: int


@dataclass(frozen=True)
class RunPlan:
    """A run on paper. `densities` holds, for each tensor, its density after the last round, where it is known."""

    counts: Counts
    prunable: list[Prunable]
    left_out: list[LeftOut]
    flops: dict[str, int]
    densities: dict[str, float]
    dense_steps: int
    rounds: list[RoundSize]
    notes: list[str]


def make(config: Config) -> RunPlan:
    """Plan a run: reads the source's labels and the network, trains and writes nothing.

    Raises UserError as the run itself would.
    """
    counts = count_samples(config)
    model = models.build(config.model, counts.classes, config.seed)
    session.check_output(model, config, counts.classes)
    prunable, left_out = models.survey(model, config.prune.include, config.prune.exclude)
    prepare.check(model, config, [tensor.name for tensor in prunable])
    flops = cost.flops(model, session.input_shape(config))
    weights, qualities, notes = known_weights(config, rounds.prunable_weights(model, prunable))
    total = sum(tensor.weights for tensor in prunable)
    other = 4 * sum(math.prod(tensor.shape) for tensor in left_out)
    steps = {
        name: recipe.total_steps(part, placement.steps_per_epoch(counts.train, config.data.lanes, part.batch_size))
        for name, part in (("dense", config.dense), ("retrain", config.retrain))
    }
    rows, keep = [], {}
    for number in range(1, len(round_plan.densities(config)) + 1):
        budget = round_plan.budget(config, number, total)
        keep = counts_at(config, number, weights, qualities)
        spent = {t.name: keep[t.name] if keep else round(budget * t.weights / total) for t in prunable}
        rows.append(
            RoundSize(
                round=number,
                density=(sum(keep.values()) or budget) / total,
                kept=sum(keep.values()) or budget,
                flops=sum(round(flops[t.name] * spent[t.name] / t.weights) for t in prunable),
                bytes=other + sum(packed_bytes(t.weights, spent[t.name]) for t in prunable),
                steps=steps["retrain"],
            )
        )
    densities = {t.name: keep[t.name] / t.weights for t in prunable} if keep else {}
    if not keep:
        notes.append(
            f"prune.allocation={config.prune.allocation}: densities of single tensors follow from trained weights"
            + (", statistics of train samples" if criteria.statistic_of(config.prune.criterion) else "")
            + (" and the scan" if round_plan.needs_scan(config) else "")
            + "; totals are exact, FLOPs and bytes assume equal densities until then"
        )
    if config.prune.allocation == "explicit":
        notes.append("target.compression is not used: prune.densities decides the size")
    return RunPlan(counts, prunable, left_out, flops, densities, steps["dense"], rows, notes)


def count_samples(config: Config) -> Counts:
    """Samples of each part, from the manifest where there is one, else from the source's labels.

    ImageNet's numbers need no files.
    """
    if config.data.source == "shards":
        manifest = shards.load_manifest(str(config.data.root))
        sizes = {split: sum(shard.samples for shard in parts) for split, parts in manifest.splits.items()}
        held = len(manifest.holdout or ())
        return Counts(sizes["train"] - held, sizes.get("val", 0) + held, sizes["test"], manifest.num_classes)
    if config.data.source == "imagenet" and config.data.root is None:
        held = round(config.data.val_fraction * ILSVRC.train)
        return Counts(ILSVRC.train - held, held, ILSVRC.test, config.data.classes or ILSVRC.classes)
    source = sources.open_source(config.data, config.seed)
    val = len(shards.draw_val(source.train.labels, config.data.val_fraction, config.seed))
    train = len(source.train.labels) - val
    return Counts(train, val, len(source.test.labels), source.num_classes)


def known_weights(
    config: Config, fresh: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float] | None, list[str]]:
    """The weights and qualities that densities can be worked out from: those of the run, where it has got so far."""
    run = state.Run(state.run_root(config), 0)
    qualities = None
    if run.has("scan", "finished.json"):
        qualities = {tensor["name"]: tensor["quality"] for tensor in run.read("scan", "scan.json")["tensors"]}
    if run.has("dense", "finished.json"):
        trained = checkpoint.load(run, "dense/checkpoint").weights
        if all(name in trained for name in fresh):
            return {name: trained[name] for name in fresh}, qualities, ["weights are those of the run's dense network"]
    return fresh, qualities, []


def counts_at(
    config: Config, number: int, weights: dict[str, Tensor], qualities: dict[str, float] | None
) -> dict[str, int]:
    """Kept count of each tensor, or nothing where it follows from weights or a scan that do not exist yet."""
    needs_weights = config.prune.allocation in ("paper", "pooled")
    trained = storage.exists(storage.join(state.run_root(config), "dense", "finished.json"))
    if needs_weights and not trained and config.dense.epochs:
        return {}
    if round_plan.needs_scan(config) and qualities is None:
        return {}
    by_scores = needs_weights or config.target.mode == "thresholds"
    if by_scores and criteria.statistic_of(config.prune.criterion):
        return {}
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    anything = {name: torch.ones_like(weight) for name, weight in weights.items()}  # counts do not follow from scores
    return round_plan.make(config, number, weights, weights, alive, qualities, anything).keep


def packed_bytes(weights: int, kept: int) -> int:
    """Predicted size of a packed tensor: fp32 values, and the smaller of a bitmask and Rice-coded gaps.

    With random positions a gap is geometric with q = 1 - density; Rice's code of width w takes 1 + w bits and
    one more for each 2^w that the gap holds, q^(2^w) / (1 - q^(2^w)) on average.
    """
    if kept == 0:
        return 0

    def bits(width: int) -> float:
        beyond = (1.0 - kept / weights) ** (2**width)
        return 1 + width + beyond / (1.0 - beyond)

    gaps = min(kept * bits(width) for width in range(1, 21)) / 8
    return math.ceil(min(4 * weights, 4 * kept + min(gaps, weights / 8)))


def require_plan_possible(plan: RunPlan) -> None:
    """Raise UserError if a part of the data is empty."""
    for name in ("train", "val", "test"):
        if getattr(plan.counts, name) == 0:
            raise UserError(f"the data has no {name} samples: check data.root and data.val_fraction")
