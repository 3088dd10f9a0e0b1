"""Checks of the axes' settings: do criterion, allocation, schedule and pattern exist, and do they fit together?

Settings only hold names. The row that a name stands for has traits, and the traits say what it can be combined with.
"""

from __future__ import annotations

from pipeline.base.errors import UserError
from pipeline.prune import allocation, criteria, patterns, schedules
from pipeline.settings.pruning import Prune, Target


def require_fitting(prune: Prune, target: Target) -> None:
    """Raise UserError for a name that does not exist, a setting that one lacks, or two that contradict each other."""
    criteria.of(prune)
    patterns.of(prune)
    chosen, schedule = allocation.of(prune), schedules.of(prune)
    if schedule.from_list:
        if not prune.list:
            raise UserError(
                f"prune: schedule={prune.schedule} needs prune.list, the density after each round: [0.5, 0.2, 0.1]"
            )
        if list(prune.list) != sorted(prune.list, reverse=True):
            raise UserError(f"prune: prune.list={[*prune.list]} must fall from round to round")
    if chosen.fixes_densities and not prune.densities:
        raise UserError(f"prune: allocation={prune.allocation} needs prune.densities: {{fc1.weight: 0.08, ...}}")
    pattern = patterns.of(prune)
    if pattern.channels:
        _require_channels(prune, target)
    elif target.budget == "latency":
        raise UserError(
            f"target.budget={target.budget} needs prune.pattern=channels: single weights that go make nothing faster"
        )
    elif target.budget != "weights" and not (chosen.spends_costs and target.to_size):
        able = " or ".join(name for name, each in allocation.ALLOCATIONS.items() if each.spends_costs)
        raise UserError(
            f"target.budget={target.budget} needs prune.allocation={able} and target.mode=compression: others count "
            "weights (with prune.pattern=channels also flops and latency)"
        )
    if not pattern.free and not pattern.channels and not target.to_size:
        raise UserError(
            f"target.mode={target.mode} finds the densities itself, and prune.pattern={prune.pattern} bounds them from "
            "the first round on: use target.mode=compression"
        )
    if target.no_loss:
        for setting, name, row in (
            ("schedule", prune.schedule, schedule),
            ("allocation", prune.allocation, chosen),
        ):
            if row.fixes_densities:
                raise UserError(
                    f"prune.{setting}={name} fixes densities, which target.mode={target.mode} finds itself: leave "
                    f"prune.{setting} out; target.step says how much a round removes"
                )


def _require_channels(prune: Prune, target: Target) -> None:
    """Raise UserError for settings that have no meaning where whole channels go."""
    named = f"prune.pattern={prune.pattern}"
    if not allocation.of(prune).shares_channels:
        able = ", ".join(name for name, each in allocation.ALLOCATIONS.items() if each.shares_channels)
        raise UserError(
            f"prune.allocation={prune.allocation} shares out weights, not channels: with {named} use {able}"
        )
    if target.by_thresholds:
        raise UserError(f"target.mode={target.mode} compares single weights with thresholds: leave {named} out")
    if target.budget == "bytes":
        raise UserError(
            f"target.budget={target.budget} counts the bytes of scattered weights: with {named} use weights, "
            "flops or latency"
        )
    if target.budget != "weights" and not target.to_size:
        raise UserError(f"target.budget={target.budget} needs target.mode=compression: campaigns count weights")
    if prune.dead_neurons:
        raise UserError(
            f"prune.dead_neurons has nothing to do with {named}, which leaves no dead units: set it to false"
        )
