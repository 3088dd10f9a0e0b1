"""A run from data to report, as its driver sees it: shards, dense, scan, rounds, final.

Each stage is skipped where its finished marker says that it was made from the same things. What needs
several processes is handed to an engine: this process alone or torchrun's (`LocalEngine`), or Ray.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

from pipeline.base.names import lookup
from pipeline.calibrate import batch_norm
from pipeline.data import shards
from pipeline.engine import Engine
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.survey import Prunable
from pipeline.network.survey import survey as survey_network
from pipeline.prune import allocation, criteria, round_plan
from pipeline.results import final
from pipeline.rounds import attempts, before_retraining, branch, campaign
from pipeline.run.events import Noted, Progress, ShardsCounted, StageBegun, Warned
from pipeline.run.records import DataFacts
from pipeline.run.result import Result
from pipeline.run.state import Run, fingerprint, open_run
from pipeline.scan import scan as scans
from pipeline.settings.config import Config
from pipeline.tracking.mirror import Mirror, patience_s
from pipeline.train import phases, session
from pipeline.train.session import Session


def run(config: Config, engine: Engine, progress: Progress) -> Result:
    """Carry a run to its end and return its result.json.

    Raises UserError (the user can mend it) or RunStopped; in both cases the state on disk is kept and
    the same command goes on from it.
    """
    with open_run(config, lambda text: progress(Noted(text))) as here:
        mirror, patience = None, patience_s()
        if config.tracking.enabled:
            mirror = Mirror(here.root, config, lambda text: progress(Warned(text)))
        try:
            check_names(config)
            made_from = shards_stage(config, here, progress)
            if not here.has("rounds", "finished.json"):
                check_network(config, here)
            made_from = dense_stage(made_from, config, engine, here, progress)
            if round_plan.needs_scan(config):
                made_from = scan_stage(made_from, config, engine, here, progress)
            made_from = train_stage("rounds", made_from, config, engine, here, progress)
            result = final_stage(made_from, config, here, progress)
            if mirror is not None and result.mlflow is None:
                started = time.monotonic()
                synced = mirror.flush(patience)
                patience = max(0.0, patience - (time.monotonic() - started))
                if synced is not None:
                    result = final.update(here, mlflow=synced.place)
        finally:
            if mirror is not None:
                mirror.close(patience)
        return result


def check_names(config: Config) -> None:
    """Raise UserError for a criterion or allocation that does not exist, before anything is spent on the run."""
    lookup(criteria.CRITERIA, config.prune.criterion, "prune.criterion")
    lookup(allocation.ALLOCATIONS, config.prune.allocation, "prune.allocation")


def check_network(config: Config, here: Run) -> None:
    """Raise UserError if the network, its checkpoint, the patterns or the budget will not do, before training.

    Warns of settings that do nothing to this network.
    """
    classes = shards.load_manifest(session.data_root(config, here)).num_classes
    model = build_network(config.model, classes, config.seed)
    session.check_output(model, config, classes)
    prunable, _ = survey_network(model, config.prune.include, config.prune.exclude)
    sizes, flops = {tensor.name: tensor.weights for tensor in prunable}, cost.flops(model, session.input_shape(config))
    round_plan.require_possible(config, sizes, flops)
    prices = round_plan.costs(config, sizes, flops)
    begin = attempts.priced(config, branch.origin(config, here, prunable), sizes, prices)
    campaign.require_room(config, begin, attempts.floor(config, prunable))
    if config.target.mode == "no-loss":
        campaign.require_enough(here.load(DataFacts, "data.json").val, config.target)
    phases.require_layers(model, config.retrain.phases)
    before_retraining.check(model, config, [tensor.name for tensor in prunable])
    for name, samples in (("prune", config.prune.bn_samples), ("scan", config.scan.bn_samples)):
        if samples and not batch_norm.norms(model):
            warnings.warn(f"{name}.bn_samples={samples} is ignored: the network has no batch norm", stacklevel=2)


def shards_stage(config: Config, here: Run, progress: Progress) -> str:
    """Build the run's shards, or take the user's; returns what they are made from."""
    started = time.monotonic()
    if config.data.source == "shards":
        manifest = shards.load_manifest(session.data_root(config, here))
        source = fingerprint("shards", manifest.made_from)
    else:
        source = fingerprint("shards", config.seed, config.data.model_dump(mode="json", include=BUILD_SETTINGS))
    if here.finished("shards", source):
        progress(StageBegun("shards", skipped=True))
        return source
    progress(StageBegun("shards"))
    if config.data.source != "shards":
        manifest = shards.build(
            config.data,
            config.seed,
            here.path("shards"),
            lambda text, done, total: progress(ShardsCounted(text, done, total)),
        )
    facts = {split: sum(shard.samples for shard in parts) for split, parts in manifest.splits.items()}
    if manifest.holdout is not None:
        facts |= {"val": len(manifest.holdout), "train": facts["train"] - len(manifest.holdout)}
    data = DataFacts(
        train=facts["train"],
        test=facts["test"],
        val=facts["val"],
        classes=manifest.num_classes,
        present=len(manifest.classes),
        source=config.data.source,
        root=config.data.root,
    )
    here.commit(data, "data.json")
    here.finish("shards", source, time.monotonic() - started)
    return source


# Settings of data that change how it is read, but not what is read.
HOW_READ = {"cache_bytes", "cache_dir", "cache_disk_bytes", "decode_threads"}
# The settings that decide which bytes `shards build` writes.
BUILD_SETTINGS = {
    "source", "root", "classes", "class_index", "val_fraction", "test_fraction", "shard_samples", "shrink", "quality",
}  # fmt: skip


def train_stage(stage: str, made_from: str, config: Config, engine: Engine, here: Run, progress: Progress) -> str:
    """Run `dense`, `rounds` or `figure5` on the engine; returns what the stage is made from."""
    started = time.monotonic()
    made_from = fingerprint(stage, made_from, stage_settings(stage, config))
    if here.finished(stage, made_from):
        progress(StageBegun(stage, skipped=True))
        return made_from
    progress(StageBegun(stage))
    engine.train(stage, config, here, progress)
    here.finish(stage, made_from, time.monotonic() - started)
    return made_from


def dense_stage(made_from: str, config: Config, engine: Engine, here: Run, progress: Progress) -> str:
    """Train the dense network, or take it and the round to begin with from `start.from`; returns what it is made of."""
    if config.start.source is None:
        return train_stage("dense", made_from, config, engine, here, progress)
    started = time.monotonic()
    made_from = fingerprint("dense", made_from, config.start.source, stage_settings("dense", config))
    if here.finished("dense", made_from):
        progress(StageBegun("dense", skipped=True))
        return made_from
    progress(StageBegun("dense"))
    branch.take(config, here, survey(config, here))
    progress(Noted(f"taken from {config.start.source}: the dense network, and what the rounds begin with"))
    here.finish("dense", made_from, time.monotonic() - started)
    return made_from


def scan_stage(
    made_from: str, config: Config, engine: Engine, here: Run, progress: Progress, merged: Sequence[str] = ()
) -> str:
    """Scan every prunable tensor; levels already known, here or in the files `merged`, are not measured again."""
    started = time.monotonic()
    made_from = fingerprint("scan", made_from, stage_settings("scan", config))
    if here.finished("scan", made_from) and not merged:
        progress(StageBegun("scan", skipped=True))
        return made_from
    scans.measure(survey(config, here), config, engine, here, progress, merged)
    here.finish("scan", made_from, time.monotonic() - started)
    return made_from


def scan(
    config: Config, engine: Engine, here: Run, progress: Progress, merged: Sequence[str] = (), after: int | None = None
) -> dict[str, Any]:
    """Only the scan, with the stages before it, or of a finished round's model; returns the content of its file."""
    if after is not None:
        scans.require_round(after, here)
        return scans.measure(survey(config, here), config, engine, here, progress, merged, after)
    made_from = shards_stage(config, here, progress)
    made_from = dense_stage(made_from, config, engine, here, progress)
    scan_stage(made_from, config, engine, here, progress, merged)
    found: dict[str, Any] = here.read("scan", "scan.json")
    return found


def final_stage(made_from: str, config: Config, here: Run, progress: Progress) -> Result:
    """Export the pruned network, judge it, and write result.json and the report."""
    started = time.monotonic()
    made_from = fingerprint("final", made_from, config.target.margin)
    if here.finished("final", made_from) and here.has("result.json"):
        progress(StageBegun("final", skipped=True))
        return here.load(Result, "result.json")
    progress(StageBegun("final"))
    result = final.finish(config, here, survey(config, here), started)
    here.finish("final", made_from, time.monotonic() - started)
    return result


def survey(config: Config, here: Run) -> list[Prunable]:
    """The prunable tensors of the run's network."""
    manifest = shards.load_manifest(session.data_root(config, here))
    model = build_network(config.model, manifest.num_classes, config.seed)
    return survey_network(model, config.prune.include, config.prune.exclude)[0]


def stage_settings(stage: str, config: Config) -> dict[str, Any]:
    """The settings that decide what a stage computes, beyond what the stages before it were made from."""
    everything = config.model_dump(mode="json")
    common = {key: everything[key] for key in ("seed", "threads", "device", "model")}
    data = {key: value for key, value in everything["data"].items() if key not in HOW_READ}
    parts = {
        "dense": {**common, "data": data, "dense": everything["dense"]},
        "scan": {
            "scan": everything["scan"] | {"together": scans.together_at(config)},
            **{key: everything["prune"][key] for key in ("criterion", "statistics_samples", "include", "exclude")},
        },
        "rounds": {key: everything[key] for key in ("prune", "retrain", "target")},
    }
    return parts["rounds" if stage == "figure5" else stage]


# What the workers of a stage do: a function of ours, imported where they run.
WORK = {
    "dense": "pipeline.rounds.method:dense",
    "rounds": "pipeline.rounds.method:prune",
    "figure5": "pipeline.paper.figure5:measure",
}


def work(stage: str, opened: Session) -> None:
    """What every worker of a training does, whichever engine started it."""
    module, _, function = WORK[stage].partition(":")
    getattr(importlib.import_module(module), function)(opened)
