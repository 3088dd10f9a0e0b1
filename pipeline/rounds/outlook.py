"""What a run would do, worked out without doing it: `secateur plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.data import placement
from pipeline.network import cost
from pipeline.network.groups import Groups
from pipeline.network.survey import LeftOut, Prunable
from pipeline.prune import allocation, criteria, limits, round_plan
from pipeline.prune.round_plan import Basis, Goal, Scanned, Standing
from pipeline.rounds import branch, campaign, preflight, sharing, timing
from pipeline.rounds.subject import prunable_weights
from pipeline.run import state
from pipeline.run.events import Outlined
from pipeline.run.records import RoundPlan, Scan
from pipeline.settings.config import Config
from pipeline.settings.pruning import Target
from pipeline.settings.training import Train
from pipeline.train import checkpoint, recipe


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
    """A run on paper. `densities` holds, for each tensor, its density after the last round, where it is known.

    `groups` are those of the channels, where whole channels are pruned; `kept_units` are left of each then.
    """

    counts: preflight.Counts
    prunable: list[Prunable]
    left_out: list[LeftOut]
    flops: dict[str, int]
    densities: dict[str, float]
    dense_steps: int
    rounds: list[RoundSize]
    notes: list[str]
    groups: Groups | None
    kept_units: dict[str, int]


def make(config: Config) -> RunPlan:
    """Plan a run. Reads the data source's labels and the network; trains nothing and writes nothing.

    Raises UserError as the run itself would.
    """
    preflight.check_names(config, planned=True)
    counts = preflight.count_samples(config.data, config.seed)
    require_samples(counts)
    preflight.require_enough(config.target, counts)
    run = state.Run(state.run_root(config), 0)
    checked = preflight.check_network(config, counts, run)
    model, prunable, flops = checked.model, checked.prunable, checked.flops
    timing.require_known(config, checked.price)
    config = config.model_copy(update={"target": checked.target})
    source = branch.find(config, prunable) if config.start.source is not None else None
    known = look_up(config, prunable_weights(model, prunable), source, counts.classes, flops, checked.groups)
    notes = [*known.notes, *target_notes(config.target)]
    sizes = {tensor.name: tensor.weights for tensor in prunable}
    total = sum(sizes.values())
    shared = sharing.bits(config, model, prunable)
    left_out = {tensor.name: math.prod(tensor.shape) for tensor in checked.left_out}
    other = sum(cost.packed_bytes(size, size, shared.get(name)) for name, size in left_out.items())
    steps = {
        name: recipe.total_steps(part, placement.steps_per_epoch(counts.train, config.data.lanes, part.batch_size))
        for name, part in (("dense", config.dense), ("retrain", config.retrain))
    }
    rows, keep, last = [], {}, None
    basis = Basis(config.prune, config.target, config.seed, known.dense, known.scan, checked.groups, checked.price)
    most = checked.begin.total  # of channels, all may stay
    if checked.groups is None:
        most = limits.spent(checked.most, round_plan.costs(config.target.budget, sizes, flops))
    for goal in campaign.outlook(config.prune, config.target, checked.begin, checked.fewest):
        share = min(goal.budget, most) / checked.begin.total
        last = plan_at(basis, goal, known)
        keep = last.keep if last else {}
        spent = keep or {name: round(share * size) for name, size in sizes.items()}
        rows.append(
            RoundSize(
                round=goal.round,
                density=(sum(keep.values()) or round(share * total)) / total,
                kept=sum(keep.values()) or round(share * total),
                flops=sum(round(flops[t.name] * spent[t.name] / t.weights) for t in prunable),
                bytes=other + sum(cost.packed_bytes(t.weights, spent[t.name], shared.get(t.name)) for t in prunable),
                steps=steps["retrain"],
                rise=last.predicted.rise if last and last.predicted else None,
            )
        )
    densities = {t.name: keep[t.name] / t.weights for t in prunable} if keep else {}
    if not keep:
        notes.append(
            f"prune.allocation={config.prune.allocation}: densities of single tensors follow from trained weights"
            + (", statistics of train samples" if criteria.of(config.prune).statistic else "")
            + (" and the scan" if round_plan.needs_scan(config.prune, config.target) else "")
            + (
                "; totals are exact, FLOPs and bytes assume equal densities until then"
                if config.target.budget == "weights"
                else "; totals assume equal densities until then"
            )
        )
    if shared:
        notes.append(f"export.codebook_bits: {len(shared)} tensors share values in the end; bytes are with that")
    notes += checked.groups.notes if checked.groups is not None else ()
    if checked.unattributed:
        notes.append(
            f"products without a weight of their own (attention's) take {checked.unattributed:,} FLOPs more, which "
            "no budget counts"
        )
    if allocation.of(config.prune).fixes_densities:
        notes.append("target.compression is not used: prune.densities decides the size")
    dense_steps = steps["dense"] if source is None else 0
    units = {group.name: group.keep for group in last.groups} if last else {}
    return RunPlan(
        counts, prunable, checked.left_out, flops, densities, dense_steps, rows, notes, checked.groups, units
    )


def outline(config: Config, counts: preflight.Counts, stages: Sequence[str], tensors: int) -> Outlined:
    """What a run is to do, for those who watch it; `tensors` is how many the scan measures."""

    def images(part: Train) -> int:
        epoch = placement.steps_per_epoch(counts.train, config.data.lanes, part.batch_size)
        return recipe.total_steps(part, epoch) * part.batch_size

    target, scan = config.target, config.scan
    levels = len(scan.levels) if scan.mode == "grid" else scan.max_levels
    return Outlined(
        stages=tuple(stages),
        rounds=None if target.no_loss else len(round_plan.densities(config.prune, target, 1.0)),
        dense=images(config.dense) if config.start.source is None else 0,
        round=images(config.retrain),
        scan=tensors * levels * (scan.samples or counts.val) if "scan" in stages else 0,
        control=config.prune.dense_control,
    )


def target_notes(target: Target) -> list[str]:
    """What a table of rounds cannot show of target.mode=no-loss."""
    if not target.no_loss:
        return []
    drop = f"more than {100 * target.allowed:.2g} points"
    lost = f"lost {drop}" if target.confidence == 0.5 else f"may have lost {drop} (confidence {target.confidence:g})"
    end = (
        "" if target.compression is None else f"; target.compression={target.compression:g} ends the run at the latest"
    )
    return [
        f"target.mode=no-loss: these are the rounds if all are accepted. A round that {lost} on val is undone and half "
        f"the step is tried, until a step would keep more than {target.smallest_step:.0%}{end}"
    ]


class Known(NamedTuple):
    """What densities can be worked out from so far; `trained` is False if the weights are freshly initialised."""

    weights: dict[str, Tensor]
    dense: dict[str, Tensor]
    alive: dict[str, Tensor]
    scan: Scanned | None
    trained: bool
    notes: list[str]


def look_up(
    config: Config, fresh: dict[str, Tensor], source: branch.Source | None, classes: int, flops: dict[str, int],
    groups: Groups | None,
) -> Known:  # fmt: skip
    """The run's scan, if finished, and the weights of its source, of its dense network if finished, or else `fresh`."""
    run = state.Run(state.run_root(config), 0)
    scan = None
    if run.has("scan", "finished.json"):
        found = run.load(Scan, "scan", "scan.json")
        if (fresh if groups is None else groups.by_name).keys() == {tensor.name for tensor in found.tensors}:
            scan = round_plan.scanned(config.target.budget, found, classes, flops, groups)
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


def plan_at(basis: Basis, goal: Goal, known: Known) -> RoundPlan | None:
    """The plan of a round, or None where it follows from weights, statistics or a scan that do not exist yet."""
    prune, target = basis.prune, basis.target
    if round_plan.uses_scores(prune, target) and (not known.trained or criteria.of(prune).statistic):
        return None
    if round_plan.needs_scan(prune, target) and basis.scan is None:
        return None
    anything = {name: torch.ones_like(weight) for name, weight in known.weights.items()}  # no count needs it
    return round_plan.make(basis, goal, Standing(known.weights, known.alive, anything))


def require_samples(counts: preflight.Counts) -> None:
    """Raise UserError if a split of the data is empty."""
    for name in ("train", "val", "test"):
        if getattr(counts, name) == 0:
            raise UserError(f"the data has no {name} samples: check data.root and data.val_fraction")
