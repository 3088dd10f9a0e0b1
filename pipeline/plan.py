"""What a run would do, worked out without doing it: `secateur plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline import cost, models, rounds, session, state
from pipeline.config import Config
from pipeline.data import placement, shards, sources, storage
from pipeline.errors import UserError
from pipeline.models import LeftOut, Prunable
from pipeline.prune import limits, round_plan
from pipeline.prune.round_plan import RoundPlan, Scanned
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
    """One round: its density over all prunable weights, and what follows from it.

    `rise` is the rise of the loss (nats) before retraining that the scan predicts; None without a scan.
    """

    round: int
    density: float
    kept: int
    flops: int
    bytes: int
    steps: int
    rise: float | None


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
    flops = cost.flops(model, session.input_shape(config))
    weights, scan, notes = known(config, rounds.prunable_weights(model, prunable), counts.classes, flops)
    sizes = {tensor.name: tensor.weights for tensor in prunable}
    total, prices = sum(sizes.values()), round_plan.costs(config, sizes, flops)
    other = 4 * sum(math.prod(tensor.shape) for tensor in left_out)
    steps = {
        name: recipe.total_steps(part, placement.steps_per_epoch(counts.train, config.data.lanes, part.batch_size))
        for name, part in (("dense", config.dense), ("retrain", config.retrain))
    }
    rows, keep, last = [], {}, None
    for number in range(1, len(round_plan.densities(config)) + 1):
        share = round_plan.budget(config, number, limits.spent(sizes, prices)) / limits.spent(sizes, prices)
        last = plan_at(config, number, weights, scan)
        keep = last.keep if last else {}
        spent = keep or {name: round(share * size) for name, size in sizes.items()}
        rows.append(
            RoundSize(
                round=number,
                density=(sum(keep.values()) or round(share * total)) / total,
                kept=sum(keep.values()) or round(share * total),
                flops=sum(round(flops[t.name] * spent[t.name] / t.weights) for t in prunable),
                bytes=other + sum(cost.packed_bytes(t.weights, spent[t.name]) for t in prunable),
                steps=steps["retrain"],
                rise=last.predicted["rise"] if last and last.predicted else None,
            )
        )
    densities = {t.name: keep[t.name] / t.weights for t in prunable} if keep else {}
    if not keep:
        notes.append(
            f"prune.allocation={config.prune.allocation}: densities of single tensors follow from trained weights"
            + (" and the scan" if round_plan.needs_scan(config) else "")
            + (
                "; totals are exact, FLOPs and bytes assume equal densities until then"
                if config.target.budget == "weights"
                else "; totals assume equal densities until then"
            )
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


def known(
    config: Config, fresh: dict[str, Tensor], classes: int, flops: dict[str, int]
) -> tuple[dict[str, Tensor], Scanned | None, list[str]]:
    """The weights and the scan that densities can be worked out from: those of the run, where it has got so far."""
    run = state.Run(state.run_root(config), 0)
    scan = None
    if run.has("scan", "finished.json"):
        content = run.read("scan", "scan.json")
        if fresh.keys() == {tensor["name"] for tensor in content["tensors"]}:
            scan = round_plan.scanned(config, content, classes, flops)
    if run.has("dense", "finished.json"):
        trained = checkpoint.load(run, "dense/checkpoint").weights
        if all(name in trained for name in fresh):
            return {name: trained[name] for name in fresh}, scan, ["weights are those of the run's dense network"]
    return fresh, scan, []


def plan_at(config: Config, number: int, weights: dict[str, Tensor], scan: Scanned | None) -> RoundPlan | None:
    """The plan of a round, or None where it follows from weights or a scan that do not exist yet."""
    needs_weights = config.prune.allocation in ("paper", "pooled")
    trained = storage.exists(storage.join(state.run_root(config), "dense", "finished.json"))
    if needs_weights and not trained and config.dense.epochs:
        return None
    if round_plan.needs_scan(config) and scan is None:
        return None
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    return round_plan.make(config, number, weights, weights, alive, scan)


def require_plan_possible(plan: RunPlan) -> None:
    """Raise UserError if a part of the data is empty."""
    for name in ("train", "val", "test"):
        if getattr(plan.counts, name) == 0:
            raise UserError(f"the data has no {name} samples: check data.root and data.val_fraction")
