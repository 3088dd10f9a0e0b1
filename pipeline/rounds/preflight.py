"""What can be known before anything is spent on a run: names, network, patterns, budget, and one throw-away step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.calibrate import batch_norm
from pipeline.data import placement, shards, sources
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.survey import LeftOut, Prunable, survey
from pipeline.prune import allocation, criteria, round_plan
from pipeline.rounds import attempts, before_retraining, branch, campaign
from pipeline.rounds.campaign import Origin
from pipeline.run.records import DataFacts
from pipeline.run.state import Run, run_root
from pipeline.settings.config import Config
from pipeline.train import first_step, phases
from pipeline.train.session import check_output, input_shape
from pipeline.train.world import choose_device


@dataclass(frozen=True)
class Counts:
    """Samples of each split, and the size of the label space."""

    train: int
    val: int
    test: int
    classes: int


ILSVRC = Counts(1_281_167, 0, 50_000, 1000)  # ImageNet 2012, whose val is our test


@dataclass(frozen=True)
class Checked:
    """A network that will do, as the config initialises it.

    `flops` are those of each tensor for one sample; the first round begins at `begin`, in what target.budget counts,
    and `fewest` weights are the least that prune.min_weights allows.
    """

    model: nn.Module
    prunable: list[Prunable]
    left_out: list[LeftOut]
    flops: dict[str, int]
    begin: Origin
    fewest: int


def check(config: Config, run: Run | None = None) -> None:
    """Check all that can be checked before the first stage of a run, which may have begun.

    Raises UserError for what will not do, and warns of settings that do nothing to this network.
    """
    check_names(config)
    run = run or Run(run_root(config), 0)
    if run.has("rounds", "finished.json"):
        return
    counts = known_counts(config, run)
    check_network(config, counts, run)
    if not run.has("dense", "finished.json"):
        first_step.require(config, counts.classes, first_step.zeros(config), choose_device(config))


def check_again(config: Config, run: Run) -> None:
    """Once there are shards: check the network against what they hold. Raises UserError as `check` does."""
    if not run.has("rounds", "finished.json"):
        check_network(config, known_counts(config, run), run)


def check_names(config: Config) -> None:
    """Raise UserError for a criterion or allocation that does not exist."""
    lookup(criteria.CRITERIA, config.prune.criterion, "prune.criterion")
    lookup(allocation.ALLOCATIONS, config.prune.allocation, "prune.allocation")


def check_network(config: Config, counts: Counts, run: Run) -> Checked:
    """Raise UserError if the network, its checkpoint, the patterns, the budget or the sizes of the data will not do.

    Warns of settings that do nothing to this network.
    """
    model = build_network(config.model, counts.classes, config.seed)
    check_output(model, config, counts.classes)
    prunable, left_out = survey(model, config.prune.include, config.prune.exclude)
    sizes, flops = {tensor.name: tensor.weights for tensor in prunable}, cost.flops(model, input_shape(config))
    round_plan.require_possible(config, sizes, flops)
    begin = branch.origin(config, run, prunable)
    begin = attempts.priced(config, begin, sizes, round_plan.costs(config, sizes, flops))
    fewest = attempts.floor(config, prunable)
    campaign.require_room(config, begin, fewest)
    if config.target.mode == "no-loss":
        campaign.require_enough(counts.val, config.target)
    phases.require_layers(model, config.retrain.phases)
    before_retraining.check(model, config, [tensor.name for tensor in prunable])
    for name, samples in (("prune", config.prune.bn_samples), ("scan", config.scan.bn_samples)):
        if samples and not batch_norm.norms(model):
            warnings.warn(f"{name}.bn_samples={samples} is ignored: the network has no batch norm", stacklevel=2)
    for name, training in first_step.trainings(config).items():
        if not placement.steps_per_epoch(counts.train, config.data.lanes, training.batch_size):
            raise UserError(
                f"train has {counts.train} samples, too few for one step of {name}.batch_size={training.batch_size} in "
                f"data.lanes={config.data.lanes} lanes: lower batch_size, or add data"
            )
    return Checked(model, prunable, left_out, flops, begin, fewest)


def known_counts(config: Config, run: Run) -> Counts:
    """The samples of a run's shards, where it has them, else of its source."""
    if run.has("data.json"):
        facts = run.load(DataFacts, "data.json")
        return Counts(facts.train, facts.val, facts.test, facts.classes)
    return count_samples(config)


def count_samples(config: Config) -> Counts:
    """Samples of each split, from the manifest where there is one, else from the source's labels.

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
