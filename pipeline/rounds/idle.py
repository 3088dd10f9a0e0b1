"""Settings that do nothing beside the others of a run: each is told of, none is left out in silence.

A setting that has its effect only beside another one has a row here, with what must hold. All others always count.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.base.environment import number
from pipeline.data import sources
from pipeline.prune import allocation, criteria, patterns, schedules
from pipeline.settings.base import is_default, short
from pipeline.settings.config import Config
from pipeline.settings.data import Data


class Row(NamedTuple):
    """A setting, whether it counts in a run, and what it needs, in words."""

    setting: str
    counts: Callable[[Config], bool]
    needs: str


def _built(data: Data) -> bool:
    return not sources.of(data).in_place


def _training(name: str) -> tuple[Row, ...]:
    """The rows of one training's settings: dense or retrain."""
    of = operator.attrgetter(name)
    return (
        Row(f"{name}.milestones", lambda c: of(c).schedule == "step", f"{name}.schedule=step"),
        Row(f"{name}.gamma", lambda c: of(c).schedule in ("step", "inv"), f"{name}.schedule=step or inv"),
        Row(f"{name}.power", lambda c: of(c).schedule == "inv", f"{name}.schedule=inv"),
        Row(f"{name}.nesterov", lambda c: of(c).optimizer == "sgd", f"{name}.optimizer=sgd"),
    )


def _compresses(config: Config) -> bool:
    """Whether a run ends at target.compression."""
    prune, target = config.prune, config.target
    if target.no_loss:
        return True
    fixed = schedules.of(prune).from_list or target.by_thresholds
    return not fixed and (target.budget != "latency" or target.latency_ms is None)


ROWS = (
    Row(
        "exchange_precision",
        lambda c: c.cluster.max_workers > 1 or number("WORLD_SIZE", 1) > 1,  # torchrun's
        "several workers: cluster.workers, or torchrun",
    ),
    Row("reproducible", lambda c: c.device != "cpu", "a GPU: device=auto or cuda"),
    Row("data.root", lambda c: sources.of(c.data).needs_root, "a data.source that reads files"),
    Row(
        "data.val_fraction",
        lambda c: _built(c.data),
        "a data.source that shards are built from: an index says what its val is",
    ),
    Row("data.test_fraction", lambda c: c.data.source in ("digits", "folder"), "data.source=digits or folder"),
    Row("data.class_index", lambda c: c.data.source in ("folder", "imagenet"), "data.source=folder or imagenet"),
    Row("data.follow_links", lambda c: c.data.source == "folder", "data.source=folder"),
    Row(
        "data.decoder",
        lambda c: c.data.source not in ("digits", "idx") or "resized-crop" in c.data.augment,
        "JPEGs, which data.source=digits or idx has none of, or data.augment with resized-crop",
    ),
    Row("data.shard_samples", lambda c: _built(c.data), "a data.source that shards are built from"),
    Row("data.build_workers", lambda c: _built(c.data), "a data.source that shards are built from"),
    Row("data.shrink", lambda c: _built(c.data), "a data.source that shards are built from"),
    Row("data.quality", lambda c: _built(c.data) and c.data.shrink is not None, "data.shrink"),
    Row("data.shift", lambda c: "shift" in c.data.augment, "data.augment with shift"),
    Row("data.cache_disk_bytes", lambda c: c.data.cache_dir is not None, "data.cache_dir"),
    Row("data.decoded_cache_bytes", lambda c: c.data.decoded_cache is not None, "data.decoded_cache"),
    Row("model.checkpoint_key", lambda c: c.model.checkpoint is not None, "model.checkpoint"),
    *_training("dense"),
    *_training("retrain"),
    Row("retrain.temperature", lambda c: c.retrain.distill > 0, "retrain.distill"),
    Row("scan.tolerance", lambda c: c.scan.mode == "adaptive", "scan.mode=adaptive"),
    Row("scan.max_levels", lambda c: c.scan.mode == "adaptive", "scan.mode=adaptive"),
    Row("scan.hopeless", lambda c: c.scan.interval is not None, "scan.interval"),
    Row("scan.together", lambda c: allocation.of(c.prune).needs_together, "prune.allocation=budget"),
    Row(
        "prune.statistics_samples",
        lambda c: criteria.of(c.prune).statistic is not None,
        "a prune.criterion with statistics: taylor or obs",
    ),
    Row("prune.densities", lambda c: allocation.of(c.prune).fixes_densities, "prune.allocation=explicit"),
    Row(
        "prune.rounds",
        lambda c: not c.target.no_loss and c.prune.schedule in ("geometric", "cubic"),
        "prune.schedule=geometric or cubic, and a target.mode other than no-loss",
    ),
    Row("prune.list", lambda c: not c.target.no_loss and schedules.of(c.prune).from_list, "prune.schedule=list"),
    Row(
        "prune.sigma",
        lambda c: c.prune.allocation == "paper" or c.target.by_thresholds,
        "prune.allocation=paper or target.mode=thresholds",
    ),
    Row(
        "prune.shrink_between_rounds",
        lambda c: patterns.of(c.prune).channels and c.retrain.epochs > 0,
        "prune.pattern=channels and retrain.epochs: only whole channels leave a smaller network to retrain",
    ),
    Row("prune.gradual_every", lambda c: c.prune.gradual > 0, "prune.gradual"),
    Row(
        "target.compression",
        _compresses,
        "no target.latency_ms, prune.list or target.mode=thresholds, which stand in its place",
    ),
    Row("target.latency_ms", lambda c: c.target.budget == "latency", "target.budget=latency"),
    Row("target.latency_table", lambda c: c.target.budget == "latency", "target.budget=latency"),
    Row("target.latency_device", lambda c: c.target.latency_table is not None, "target.latency_table"),
    Row("target.latency_batch", lambda c: c.target.budget == "latency", "target.budget=latency"),
    Row("target.step", lambda c: c.target.no_loss, "target.mode=no-loss"),
    Row("target.smallest_step", lambda c: c.target.no_loss, "target.mode=no-loss"),
    Row("target.tolerance", lambda c: c.target.no_loss, "target.mode=no-loss"),
    Row("target.confidence", lambda c: c.target.no_loss, "target.mode=no-loss"),
    Row("target.max_rounds", lambda c: c.target.no_loss, "target.mode=no-loss"),
    Row("export.codebook_epochs", lambda c: bool(c.export.codebook_bits), "export.codebook_bits"),
    Row("cluster.resize_seconds", lambda c: not isinstance(c.cluster.workers, int), "cluster.workers=[min, max]"),
    Row("cluster.lease_seconds", lambda c: not storage.is_local(c.runs_dir), "runs_dir on S3"),
    Row("tracking.uri", lambda c: c.tracking.enabled, "tracking.enabled=true"),
    Row("tracking.experiment", lambda c: c.tracking.enabled, "tracking.enabled=true"),
    Row(
        "tracking.register",
        lambda c: c.tracking.enabled and c.tracking.models != "none",
        "tracking.enabled=true, and tracking.models=rounds or final",
    ),
    Row("tracking.models", lambda c: c.tracking.enabled, "tracking.enabled=true"),
    Row("tracking.system_metrics", lambda c: c.tracking.enabled, "tracking.enabled=true"),
)


def idle(config: Config) -> Iterator[str]:
    """A sentence for each setting that was given, is not at its default and does nothing in this run.

    The names of criterion, allocation, pattern, schedule and source must exist.
    """
    for row in ROWS:
        *parents, leaf = row.setting.split(".")
        section: Any = config
        for parent in parents:
            section = getattr(section, parent)
        if leaf in section.model_fields_set and not is_default(section, leaf) and not row.counts(config):
            value = getattr(section, leaf)
            given = short([*value] if isinstance(value, tuple) else value, 60)
            yield f"{row.setting}={given} is ignored: it needs {row.needs}"
