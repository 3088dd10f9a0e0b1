"""What a run would do, worked out without doing it: `secateur plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.data import placement, shards, sources
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.survey import LeftOut, Prunable, survey
from pipeline.prune import criteria, round_plan
from pipeline.prune.round_plan import Goal, Scanned
from pipeline.rounds import attempts, before_retraining, branch, campaign
from pipeline.rounds.subject import prunable_weights
from pipeline.run import state
from pipeline.run.records import RoundPlan, Scan
from pipeline.settings.config import Config
from pipeline.train import checkpoint, recipe, session


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
    model = build_network(config.model, counts.classes, config.seed)
    session.check_output(model, config, counts.classes)
    prunable, left_out = survey(model, config.prune.include, config.prune.exclude)
    before_retraining.check(model, config, [tensor.name for tensor in prunable])
    flops = cost.flops(model, session.input_shape(config))
    source = branch.find(config, prunable) if config.start.source is not None else None
    known = look_up(config, prunable_weights(model, prunable), source, counts.classes, flops)
    notes = [*known.notes, *target_notes(config)]
    sizes = {tensor.name: tensor.weights for tensor in prunable}
    total = sum(sizes.values())
    other = 4 * sum(math.prod(tensor.shape) for tensor in left_out)
    steps = {
        name: recipe.total_steps(part, placement.steps_per_epoch(counts.train, config.data.lanes, part.batch_size))
        for name, part in (("dense", config.dense), ("retrain", config.retrain))
    }
    begin = campaign.Origin(total, total) if source is None else source.origin
    begin = attempts.priced(config, begin, sizes, round_plan.costs(config, sizes, flops))
    fewest = attempts.floor(config, prunable)
    round_plan.require_possible(config, sizes, flops)
    campaign.require_room(config, begin, fewest)
    rows, keep, last = [], {}, None
    for goal in campaign.outlook(config, begin, fewest):
        share = goal.budget / begin.total
        last = plan_at(config, goal, known)
        keep = last.keep if last else {}
        spent = keep or {name: round(share * size) for name, size in sizes.items()}
        rows.append(
            RoundSize(
                round=goal.round,
                density=(sum(keep.values()) or round(share * total)) / total,
                kept=sum(keep.values()) or round(share * total),
                flops=sum(round(flops[t.name] * spent[t.name] / t.weights) for t in prunable),
                bytes=other + sum(cost.packed_bytes(t.weights, spent[t.name]) for t in prunable),
                steps=steps["retrain"],
                rise=last.predicted.rise if last and last.predicted else None,
            )
        )
    densities = {t.name: keep[t.name] / t.weights for t in prunable} if keep else {}
    if not keep:
        notes.append(
            f"prune.allocation={config.prune.allocation}: densities of single tensors follow from trained weights"
            + (", statistics of train samples" if criteria.statistic_of(config.prune.criterion) else "")
            + (" and the scan" if round_plan.needs_scan(config) else "")
            + (
                "; totals are exact, FLOPs and bytes assume equal densities until then"
                if config.target.budget == "weights"
                else "; totals assume equal densities until then"
            )
        )
    if config.prune.allocation == "explicit":
        notes.append("target.compression is not used: prune.densities decides the size")
    dense_steps = steps["dense"] if source is None else 0
    return RunPlan(counts, prunable, left_out, flops, densities, dense_steps, rows, notes)


def target_notes(config: Config) -> list[str]:
    """What a table of rounds cannot say of target.mode=no-loss."""
    target = config.target
    if target.mode != "no-loss":
        return []
    drop = f"more than {100 * target.allowed:.2g} points"
    lost = f"lost {drop}" if target.confidence == 0.5 else f"may have lost {drop} (confidence {target.confidence:g})"
    end = "" if target.compression is None else f"; target.compression={target.compression:g} is the end at the latest"
    return [
        f"target.mode=no-loss: these are the rounds if all are accepted. One that {lost} on val is undone and half the "
        f"step tried, until a step would keep more than {target.smallest_step:.0%}{end}"
    ]


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


class Known(NamedTuple):
    """What densities can be worked out from so far; `trained` where the weights are not those of a fresh network."""

    weights: dict[str, Tensor]
    dense: dict[str, Tensor]
    alive: dict[str, Tensor]
    scan: Scanned | None
    trained: bool
    notes: list[str]


def look_up(
    config: Config, fresh: dict[str, Tensor], source: branch.Source | None, classes: int, flops: dict[str, int]
) -> Known:
    """The weights and the scan of the run, where it has got so far, or of the run that it branches off from."""
    run = state.Run(state.run_root(config), 0)
    scan = None
    if run.has("scan", "finished.json"):
        found = run.load(Scan, "scan", "scan.json")
        if fresh.keys() == {tensor.name for tensor in found.tensors}:
            scan = round_plan.scanned(config, found, classes, flops)
    everything = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in fresh.items()}
    if source is not None:
        saved = checkpoint.load(source.run, source.checkpoint)
        dense = checkpoint.load(source.run, "dense/checkpoint").weights
        weights, shared = ({name: part[name] for name in fresh} for part in (saved.weights, dense))
        note = f"starts from round {source.round} of '{source.run.root}', whose dense network it shares"
        return Known(weights, shared, everything | saved.masks, scan, True, [note])
    if run.has("dense", "finished.json"):
        trained = checkpoint.load(run, "dense/checkpoint").weights
        if all(name in trained for name in fresh):
            first = {name: trained[name] for name in fresh}
            return Known(first, first, everything, scan, True, ["weights are those of the run's dense network"])
    return Known(fresh, fresh, everything, scan, not config.dense.epochs, [])


def plan_at(config: Config, goal: Goal, known: Known) -> RoundPlan | None:
    """The plan of a round, or None where it follows from weights, statistics or a scan that do not exist yet."""
    by_scores = config.prune.allocation in ("paper", "pooled") or config.target.mode == "thresholds"
    if by_scores and (not known.trained or criteria.statistic_of(config.prune.criterion)):
        return None
    if round_plan.needs_scan(config) and known.scan is None:
        return None
    anything = {name: torch.ones_like(weight) for name, weight in known.weights.items()}  # counts follow from no score
    return round_plan.make(config, goal, known.weights, known.dense, known.alive, known.scan, anything)


def require_plan_possible(plan: RunPlan) -> None:
    """Raise UserError if a part of the data is empty."""
    for name in ("train", "val", "test"):
        if getattr(plan.counts, name) == 0:
            raise UserError(f"the data has no {name} samples: check data.root and data.val_fraction")
