"""Checks before anything is spent on a run: names, network, patterns, budget, and one throw-away step."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.base.errors import UserError
from pipeline.base.names import few
from pipeline.calibrate import batch_norm
from pipeline.data import placement, shards, sources
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.groups import Groups
from pipeline.network.survey import LeftOut, Prunable, survey
from pipeline.prune import axes, channels, latency, patterns, round_plan
from pipeline.prune.channels import Price
from pipeline.rounds import attempts, before_retraining, branch, campaign, retraining, sharing, subject, timing
from pipeline.rounds.campaign import Origin
from pipeline.run.records import DataFacts
from pipeline.run.state import Run, run_root
from pipeline.settings.config import Config
from pipeline.settings.data import Data
from pipeline.settings.pruning import Target
from pipeline.task.feed import Feed, task_of
from pipeline.train import first_step, phases
from pipeline.train.session import check_output


@dataclass(frozen=True)
class Counts:
    """Samples of each split, and the size of the label space."""

    train: int
    val: int
    test: int
    classes: int


@dataclass(frozen=True)
class Checked:
    """A network that passed the checks, initialised as the config says.

    `flops` holds each tensor's FLOPs for one sample, `unattributed` those of no single tensor. The first round begins
    at `begin`, in the unit of target.budget. `fewest` is the smallest number of weights that prune.min_weights allows,
    and `most` the largest of each tensor that the pattern allows. `groups` are those of the channels, where whole
    channels are pruned, and `price` what they cost; `target` has
    target.latency_ms, where it is given and a table is known, as target.compression.
    """

    model: nn.Module
    prunable: list[Prunable]
    left_out: list[LeftOut]
    flops: dict[str, int]
    unattributed: int
    begin: Origin
    fewest: int
    most: dict[str, int]
    groups: Groups | None
    price: Price | None
    target: Target


def check(config: Config, run: Run | None = None) -> None:
    """Check all that can be checked before the first stage of a run; the run may have begun before.

    Raises UserError for what fails, and warns of settings that have no effect on this network.
    """
    check_names(config)
    run = run or Run(run_root(config), 0)
    if run.has("rounds", "finished.json"):
        return
    counts = known_counts(config.data, config.seed, run)
    check_network(config, counts, run)
    require_enough(config.target, counts)
    if not run.has("dense", "finished.json"):
        # Whether it can be compiled is for the workers to find: they have the compiler, and the batch that counts.
        plain = config.model_copy(update={"compile": False})
        device = timing.workers_device(config) or torch.device("cpu")
        first_step.require(plain, counts.classes, first_step.zeros(config.data), device)


def check_again(config: Config, run: Run) -> None:
    """Check the network against the shards, once they are built. Raises UserError as `check` does."""
    if not run.has("rounds", "finished.json"):
        counts = known_counts(config.data, config.seed, run)
        check_network(config, counts, run)
        require_enough(config.target, counts)


def check_names(config: Config, *, planned: bool = False) -> None:
    """Raise UserError for a name that does not exist, and for settings that do not fit together.

    With `planned`, a source whose sample counts are known needs no data.root.
    """
    task_of(config.task)
    model = config.model
    given = model.checkpoint is not None or model.trained or config.start.source is not None
    if not planned and not config.dense.epochs and not given:
        raise UserError(
            "dense.epochs=0 and no model.checkpoint: there is nothing trained to prune; set one of them, or "
            "model.trained=true where the factory brings trained weights"
        )
    axes.require_fitting(config.prune, config.target)
    sources.require_root(config.data, planned=planned)


def check_network(config: Config, counts: Counts, run: Run) -> Checked:
    """Raise UserError if the network, its checkpoint, the patterns, the budget or the sizes of the data are unusable.

    Warns of settings that have no effect on this network.
    """
    model = build_network(config.model, counts.classes, config.seed)
    feed = Feed.of(config)
    check_output(model, config.model.factory, feed, counts.classes)
    prunable, left_out = survey(model, config.prune.include, config.prune.exclude)
    sizes, counted = {tensor.name: tensor.weights for tensor in prunable}, cost.count(model, feed.shape)
    flops = counted.by_tensor
    require_counted(counted, sizes, config.target.budget)
    living = patterns.most(config.prune, {tensor.name: tensor.shape for tensor in prunable})
    groups = channels.groups_of(model, prunable, feed.zeros(2, torch.device("cpu")), config.prune)
    unit = config.target.budget
    price = subject.price_of(unit, groups, sizes, flops, timing.known(config, run, groups))
    total = subject.whole(unit, groups, price, sizes, flops)
    if price is not None:
        config = config.model_copy(update={"target": latency.aimed(config.target, total)})
    round_plan.require_possible(config.prune, config.target, sizes, living, flops, groups, price)
    dense = None if config.dense.epochs else subject.prunable_weights(model, prunable)
    begin = attempts.priced(unit, branch.origin(config, run, prunable, dense), total)
    fewest = attempts.floor(config.prune, prunable, groups)
    campaign.require_room(config.prune, config.target, begin, fewest, config.start.source)
    phases.require_layers(model, config.retrain.phases)
    before_retraining.check(model, config.prune, [*sizes], counted.outside)
    if config.prune.shrink_between_rounds:
        retraining.require(model, groups, feed, f"model.factory={config.model.factory}")
    sharing.bits(config, model, prunable)
    for name, samples in (("prune", config.prune.bn_samples), ("scan", config.scan.bn_samples)):
        if samples and not batch_norm.norms(model):
            warnings.warn(f"{name}.bn_samples={samples} is ignored: the network has no batch norm", stacklevel=2)
    for name, training in first_step.trainings(config.dense, config.retrain).items():
        if not placement.steps_per_epoch(counts.train, config.data.lanes, training.batch_size):
            raise UserError(
                f"train has {counts.train} samples, too few for one step of {name}.batch_size={training.batch_size} in "
                f"data.lanes={config.data.lanes} lanes: lower batch_size, or add data"
            )
    return Checked(
        model, prunable, left_out, flops, counted.unattributed, begin, fewest, living, groups, price, config.target
    )


def require_counted(counted: cost.Counted, names: Collection[str], budget: cost.Quantity) -> None:
    """Warn of tensors that the forward pass never uses, or whose FLOPs cannot be told; a budget of FLOPs needs these.

    Raises UserError where it is one.
    """
    unknown = [name for name in counted.uncounted if name in names]
    text = f"the FLOPs of {few(unknown)} cannot be counted: no operator multiplies by it alone"
    if unknown and budget == "flops":
        raise UserError(f"target.budget=flops: {text}; name it in prune.exclude, or choose another target.budget")
    if unknown:
        warnings.warn(text, stacklevel=3)
    unused = [name for name in counted.unused if name in names]
    if unused:
        warnings.warn(
            f"the forward pass in evaluation mode never uses {few(unused)}: it has no FLOPs; name it in prune.exclude "
            "to leave it alone",
            stacklevel=3,
        )


def require_enough(target: Target, counts: Counts) -> None:
    """Raise UserError where val is too small for a campaign without loss to accept anything."""
    if target.no_loss:
        campaign.require_enough(counts.val, target)


def known_counts(data: Data, seed: int, run: Run) -> Counts:
    """The sample counts of a run's shards if it has any, else of its data source."""
    if run.has("data.json"):
        facts = run.load(DataFacts, "data.json")
        return Counts(facts.train, facts.val, facts.test, facts.classes)
    return count_samples(data, seed)


def count_samples(data: Data, seed: int) -> Counts:
    """Samples of each split, from the manifest where there is one, else from the source's labels.

    Some sources' counts are known without their files.
    """
    kind = sources.of(data)
    if kind.in_place:
        manifest = shards.load_manifest(str(data.root))
        return Counts(**manifest.sizes, classes=manifest.num_classes)
    if data.root is None and kind.sizes is not None:
        held = round(data.val_fraction * kind.sizes.train)
        return Counts(kind.sizes.train - held, held, kind.sizes.test, data.classes or kind.sizes.classes)
    source = sources.open_source(data, seed)
    train = len(source.train.labels)
    if source.val is not None:
        return Counts(train, len(source.val.labels), len(source.test.labels), source.num_classes)
    val = len(shards.draw_val(source.train.labels, data.val_fraction, seed))
    train -= val
    return Counts(train, val, len(source.test.labels), source.num_classes)
