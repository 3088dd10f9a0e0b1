"""The retraining of a round: in the whole network, or in one that has only the channels that are left.

SPMD, as `pipeline.rounds.method`. A small network lives for one training. All else (plans, masks, checkpoints of
rounds, results) has the whole network, into which the trained numbers are put back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.base import blame
from pipeline.base.errors import UserError
from pipeline.network import dropout
from pipeline.network.apart import ROUNDING, apart
from pipeline.network.build import FOREIGN
from pipeline.network.groups import Groups
from pipeline.network.shrink import Small, shrink
from pipeline.prune.gradual import Gradual
from pipeline.rounds import before_retraining
from pipeline.rounds.subject import Subject
from pipeline.run.events import Noted
from pipeline.task.feed import Feed
from pipeline.train.loop import Position, Training
from pipeline.train.session import Session

SETTING = "prune.shrink_between_rounds=true"
SAMPLES = 2  # that the small network is tried with; batch norm needs more than one


def retrain(
    subject: Subject,
    folder: str,
    order: str,
    kept: dict[str, Tensor],
    rates: Mapping[str, float],
    gradual: Gradual | None,
) -> tuple[Position, dict[str, Tensor]]:
    """Retrain the network with the masks `kept`; returns where it ended, and its masks, which `gradual` changes.

    `folder` and `order` are those of `Training`, `rates` those of its dropouts.
    """
    session, model, recipe = subject.session, subject.model, subject.session.config.retrain
    small = None
    if session.config.prune.shrink_between_rounds and subject.groups is not None:
        small = _small(session, model, subject.groups, kept, folder)
    network, masks, cut = (model, kept, "") if small is None else (small.model, small.cut(kept), small.digest)
    teacher = before_retraining.teacher(session, recipe)
    training = Training(session, network, recipe, folder, order, list(kept), masks, gradual, teacher, cut=cut)
    with dropout.use(network, rates):
        position = training.fit()
    training.applier.clean()
    if small is not None:
        model.load_state_dict(small.put_back(model.state_dict()))
    return position, training.masks if gradual else kept


def require(model: nn.Module, groups: Groups | None, feed: Feed, factory: str) -> None:
    """Raise UserError if a network on the CPU cannot be retrained with fewer channels; tries half of each group."""
    if groups is None:
        return
    if groups.hard_coded:
        raise UserError(
            f"{SETTING}: {factory} has a number of features in its code, at {', '.join(groups.hard_coded)}, and takes "
            "no other: write torch.flatten(x, 1) there, or -1 for the number of heads; or set it to false"
        )
    masks = groups.masks({name: flags.cumsum() % 2 == 1 for name, flags in groups.whole.items()})
    masked = copy.deepcopy(model)
    for name, mask in masks.items():
        masked.get_parameter(name).data.mul_(mask)
    try:
        with torch.random.fork_rng(devices=[]):
            small = shrink(masked, groups, masks).model
            different = apart(masked, small, feed.zeros(SAMPLES))
            small.train()(feed.zeros(SAMPLES))
    except FOREIGN as error:
        raise UserError(
            f"{SETTING}: {factory} cannot be trained with fewer channels: {' '.join(str(error).split())[:300]}"
            f"{blame.place(error)}; set it to false, or name the layer in prune.exclude"
        ) from error
    if different > ROUNDING:
        raise UserError(
            f"{SETTING}: {factory} with half of its channels does not answer as with the others masked (outputs differ "
            f"by {different:.1%} of the largest), so its code was not understood: set it to false"
        )


def _small(session: Session, model: nn.Module, groups: Groups, kept: dict[str, Tensor], folder: str) -> Small:
    """The network without the channels that go. Raises Agreed, on every rank, if it is not the same function."""
    small = shrink(model, groups, kept)
    session.feed.place(small.model, session.world.device)
    different = apart(model, small.model, session.feed.zeros(SAMPLES, session.world.device))
    session.world.agree(
        f"{folder}: outputs of the small network differ from the masked one's by {different:.1%} of the largest: set "
        "prune.shrink_between_rounds=false"
        if not different <= ROUNDING
        else None
    )
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (small.model, model)]
    session.progress(Noted(f"{folder} retrains a network of {sizes[0]:,} of {sizes[1]:,} parameters"))
    return small
