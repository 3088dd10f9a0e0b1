"""The network that is pruned, and what its rounds are planned from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.network import cost
from pipeline.network.groups import Groups
from pipeline.network.survey import Prunable, survey
from pipeline.prune import channels, latency, limits, round_plan
from pipeline.prune.channels import Price
from pipeline.prune.round_plan import Basis, Scanned
from pipeline.rounds import timing
from pipeline.run.records import LatencyTable, Scan
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import Session


@dataclass(frozen=True)
class Subject:
    """The network that the rounds prune, equal on every rank. Only `model` changes.

    `prunable` lists its prunable tensors, `dense` holds their weights in the dense network by name. `scan` holds the
    scan's results for them if the config's allocation needs a scan, `groups` the groups of its channels if whole
    channels are pruned. `total` is what the whole network costs, in the unit target.budget; `price` says what
    channels do.
    """

    session: Session
    model: nn.Module
    prunable: list[Prunable]
    dense: dict[str, Tensor]
    scan: Scanned | None
    groups: Groups | None
    price: Price | None
    total: int

    @property
    def weights(self) -> dict[str, Tensor]:
        """The prunable tensors as they now are, by name, detached."""
        return prunable_weights(self.model, self.prunable)

    @property
    def basis(self) -> Basis:
        """What its rounds are planned from, besides their goals and the current weights."""
        config = self.session.config
        return Basis(config.prune, config.target, config.seed, self.dense, self.scan, self.groups, self.price)

    @property
    def everything(self) -> dict[str, Tensor]:
        """Masks that keep all weights."""
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.dense.items()}

    def share(self, alive: Mapping[str, Tensor]) -> float:
        """What is alive of the whole network, in the unit of target.budget."""
        if self.price is not None and self.groups is not None:
            units = {name: int(flags.sum()) for name, flags in self.groups.alive(alive).items()}
            return self.price(units) / self.total
        kept = {name: int(mask.sum()) for name, mask in alive.items()}
        prices = self.scan.prices if self.scan is not None and self.session.config.target.budget != "weights" else {}
        return limits.spent(kept, prices) / self.total

    def load(self, saved: Checkpoint) -> dict[str, Tensor]:
        """Load a checkpoint into the network, and return its masks."""
        self.model.load_state_dict(saved.weights)
        return {name: mask.to(self.session.world.device) for name, mask in saved.masks.items()}


def open_subject(session: Session) -> Subject:
    """The dense network of the session's run, as a subject for the rounds.

    Its own session has target.latency_ms, where it is given, as target.compression.
    """
    config = session.config
    model = session.new_model()
    model.load_state_dict(checkpoint.load(session.run, "dense/checkpoint").weights)
    prunable, _ = survey(model, config.prune.include, config.prune.exclude)
    dense = {name: weight.clone() for name, weight in prunable_weights(model, prunable).items()}
    unit, scan = config.target.budget, None
    sizes, flops = {tensor.name: tensor.weights for tensor in prunable}, cost.flops(model, session.feed.shape)
    groups = channels.groups_of(model, prunable, session.feed.zeros(2, session.world.device), config.prune)
    if round_plan.needs_scan(config.prune, config.target):
        found = session.run.load(Scan, "scan", "scan.json")
        scan = round_plan.scanned(unit, found, session.manifest.num_classes, flops, groups)
    price = price_of(unit, groups, sizes, flops, timing.known(config, session.run, groups))
    total = whole(unit, groups, price, sizes, flops)
    target = latency.aimed(config.target, total)
    session = replace(session, config=config.model_copy(update={"target": target}))
    return Subject(session, model, prunable, dense, scan, groups, price, total)


def price_of(
    unit: cost.Quantity,
    groups: Groups | None,
    sizes: Mapping[str, int],
    flops: Mapping[str, int],
    table: LatencyTable | None = None,
) -> Price | None:
    """What the channels of groups cost, in `unit`; None without groups, or for a latency without a table.

    `sizes` and `flops` are the dense tensors'.
    """
    if groups is None or (unit == "latency" and table is None):
        return None
    if table is not None:
        return latency.price(groups, table)
    return channels.by_tensor(groups, round_plan.costs(unit, sizes, flops))


def whole(
    unit: cost.Quantity, groups: Groups | None, price: Price | None, sizes: Mapping[str, int], flops: Mapping[str, int]
) -> int:
    """What the whole network costs, in `unit`; in weights as long as the price of channels is not known."""
    if groups is not None:
        return sum(sizes.values()) if price is None else price(groups.sizes)
    return limits.spent(sizes, round_plan.costs(unit, sizes, flops))


def prunable_weights(model: nn.Module, prunable: Sequence[Prunable]) -> dict[str, Tensor]:
    """The prunable tensors of a model by name, detached."""
    parameters = dict(model.named_parameters())
    return {tensor.name: parameters[tensor.name].detach() for tensor in prunable}
