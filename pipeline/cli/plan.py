"""`secateur plan`: first what a run would do in about ten lines; every list with --full."""

from __future__ import annotations

import json
from collections import Counter

from pipeline import stages
from pipeline.base.record import plain
from pipeline.cli.progress import clock
from pipeline.network.survey import LeftOut
from pipeline.results.words import count, number, percent, size
from pipeline.rounds import duration, outlook
from pipeline.rounds.duration import Needs
from pipeline.rounds.outlook import RunPlan
from pipeline.run.events import Outlined
from pipeline.settings.config import Config
from pipeline.settings.data import Data

GROUPS = 5  # reasons for which tensors stay dense that the summary names


def needs(config: Config, plan: RunPlan) -> tuple[Needs, Outlined]:
    """What the run takes, steps of it tried out here, and what it would do."""
    names = [stage.name for stage in stages.up_to(config, stages.ROUNDS, stages.FINAL)]
    outline = outlook.outline(config, plan.counts, names, len(plan.prunable))
    return duration.of(config, plan, outline), outline


def summary(config: Config, plan: RunPlan, needed: Needs, outline: Outlined) -> list[str]:
    """A run in about ten lines."""
    total = sum(tensor.weights for tensor in plan.prunable)
    counts = plan.counts
    rows = [
        ("run", f"{config.name}: {config.model.factory} on {_source(config.data)}"),
        (
            "data",
            f"{count(counts.train)} train, {count(counts.val)} val, {count(counts.test)} test samples, "
            f"{counts.classes} classes",
        ),
        ("prunes", f"{count(total)} weights in {len(plan.prunable)} tensors ({_tensors(plan)})"),
        ("stays", stays(plan.left_out) or "no tensor stays as it is"),
        ("rounds", _rounds(config, plan, total)),
        ("steps", _steps(config, plan, outline)),
        *([("scan", f"{count(outline.scan)} images looked at")] if "scan" in outline.stages else []),
        ("time", _time(config, needed, outline)),
        ("memory", f"{size(needed.memory)} in each worker, and the activations of a batch"),
        ("disk", f"about {size(needed.disk)} in {config.runs_dir}, and the shards"),
    ]
    return [f"{label:<7} {text}" for label, text in rows]


def stays(left_out: list[LeftOut]) -> str:
    """Which tensors stay dense, grouped by the reason."""
    groups = Counter(tensor.reason for tensor in left_out).most_common()
    said = [f"{number} {reason}" if number > 1 else reason for reason, number in groups[:GROUPS]]
    others = sum(number for _, number in groups[GROUPS:])
    more = [f"{others} for other reasons"] if others else []
    return f"{len(left_out)} tensors stay as they are: {'; '.join([*said, *more])}" if groups else ""


def as_json(plan: RunPlan, needed: Needs) -> str:
    """The plan for scripts."""
    return json.dumps(
        {
            "samples": plain(plan.counts),
            "prunable": [
                {"name": t.name, "kind": t.kind, "shape": t.shape, "weights": t.weights} for t in plan.prunable
            ],
            "left_out": plain(plan.left_out),
            "densities": plan.densities,
            "dense_steps": plan.dense_steps,
            "rounds": plain(plan.rounds),
            "seconds": needed.seconds,
            "memory_bytes": needed.memory,
            "disk_bytes": needed.disk,
            "notes": plan.notes,
        },
        indent=1,
    )


def _source(data: Data) -> str:
    return data.source if data.root is None else f"{data.source} {data.root}"


def _tensors(plan: RunPlan) -> str:
    kinds = Counter(tensor.kind for tensor in plan.prunable)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.items())


def _rounds(config: Config, plan: RunPlan, total: int) -> str:
    if not plan.rounds:
        return "none"
    last = plan.rounds[-1]
    most = "up to " if config.target.no_loss else ""
    rise = "" if last.rise is None else f"; predicted rise of the loss before retraining: {last.rise:.4f}"
    return (
        f"{most}{len(plan.rounds)} ({config.prune.allocation}, {config.prune.schedule}), to {count(last.kept)} "
        f"weights, {percent(last.density)} of them ({number(total / last.kept)}×), {size(last.bytes)}{rise}"
    )


def _steps(config: Config, plan: RunPlan, outline: Outlined) -> str:
    each = plan.rounds[0].steps if plan.rounds else 0
    control = f", and {count(len(plan.rounds) * each)} of the dense control" if outline.control else ""
    return f"{count(plan.dense_steps)} dense, {len(plan.rounds)} × {count(each)} in the rounds{control}"


def _time(config: Config, needed: Needs, outline: Outlined) -> str:
    if needed.seconds is None or needed.per_image_s is None:
        return f"not known: {needed.why}"
    workers = config.cluster.min_workers
    who = "one worker" if workers == 1 else f"{workers} workers as fast as this machine"
    atmost = " if all rounds are accepted" if outline.rounds is None else ""
    return (
        f"about {clock(needed.seconds)} with {who}{atmost}: {1000 * needed.per_image_s:.3g} ms of training an image, "
        f"measured here ({needed.device}); start, evaluation and reading of data come on top"
    )
