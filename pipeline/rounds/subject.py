"""The network that is pruned, and what its rounds are planned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.network import cost
from pipeline.network.groups import Groups, find
from pipeline.network.survey import Prunable, survey
from pipeline.prune import patterns, round_plan
from pipeline.prune.budget import Cost
from pipeline.prune.round_plan import Basis, Scanned
from pipeline.run.records import Scan
from pipeline.settings.pruning import Prune
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import Session


@dataclass(frozen=True)
class Subject:
    """The network that the rounds prune, equal on every rank. Only `model` changes.

    `prunable` lists its prunable tensors, `dense` holds their weights in the dense network by name. `scan` holds the
    scan's results for them if the config's allocation needs a scan, `groups` the groups of its channels if whole
    channels are pruned. `prices` say what each tensor costs, in the unit target.budget, where there is one of them.
    """

    session: Session
    model: nn.Module
    prunable: list[Prunable]
    dense: dict[str, Tensor]
    scan: Scanned | None
    groups: Groups | None = None
    prices: dict[str, Cost] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The prunable tensors as they now are, by name, detached."""
        return prunable_weights(self.model, self.prunable)

    @property
    def basis(self) -> Basis:
        """What its rounds are planned from, besides their goals and the current weights."""
        config = self.session.config
        return Basis(config.prune, config.target, config.seed, self.dense, self.scan, self.groups, self.prices)

    @property
    def everything(self) -> dict[str, Tensor]:
        """Masks that keep all weights."""
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.dense.items()}

    def load(self, saved: Checkpoint) -> dict[str, Tensor]:
        """Load a checkpoint into the network, and return its masks."""
        self.model.load_state_dict(saved.weights)
        return {name: mask.to(self.session.world.device) for name, mask in saved.masks.items()}


def open_subject(session: Session) -> Subject:
    """The dense network of the session's run, as a subject for the rounds."""
    config = session.config
    model = session.new_model()
    model.load_state_dict(checkpoint.load(session.run, "dense/checkpoint").weights)
    prunable, _ = survey(model, config.prune.include, config.prune.exclude)
    dense = {name: weight.clone() for name, weight in prunable_weights(model, prunable).items()}
    unit, scan, prices = config.target.budget, None, {}
    groups = channels_of(model, prunable, session.feed.zeros(2, session.world.device), config.prune)
    if round_plan.needs_scan(config.prune, config.target):
        found = session.run.load(Scan, "scan", "scan.json")
        flops = cost.flops(model, session.feed.shape)
        scan = round_plan.scanned(unit, found, session.manifest.num_classes, flops)
        prices = scan.prices
    elif groups is not None:
        sizes = {tensor.name: tensor.weights for tensor in prunable}
        prices = round_plan.costs(unit, sizes, cost.flops(model, session.feed.shape))
    return Subject(session, model, prunable, dense, scan, groups, prices)


def channels_of(model: nn.Module, prunable: Sequence[Prunable], example: Tensor, prune: Prune) -> Groups | None:
    """The groups of a network's channels, where the settings prune whole channels; `example` is a batch of inputs."""
    if not patterns.of(prune).channels:
        return None
    return find(model, example, {tensor.name: tensor.shape for tensor in prunable})


def prunable_weights(model: nn.Module, prunable: Sequence[Prunable]) -> dict[str, Tensor]:
    """The prunable tensors of a model by name, detached."""
    parameters = dict(model.named_parameters())
    return {tensor.name: parameters[tensor.name].detach() for tensor in prunable}
