"""What a pruned network goes through before it is retrained, each part a setting; every rank does the same."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pipeline import models, seeding
from pipeline.config import Retrain
from pipeline.errors import Agreed
from pipeline.prune import dead, masks
from pipeline.prune.round_plan import RoundPlan
from pipeline.session import Session, input_shape
from pipeline.train import batch_norm, checkpoint, dropout


def remove_dead(
    session: Session, model: nn.Module, plan: RoundPlan, kept: dict[str, Tensor]
) -> tuple[RoundPlan, dict[str, Tensor]]:
    """prune.dead_neurons: the plan and masks without the connections of dead units, counted in the plan's `dead`.

    Constants of dead units go into biases of `model`. Raises Agreed if the ranks' masks differ.
    """
    if not session.config.prune.dead_neurons:
        return plan, kept
    example = torch.zeros(2, *input_shape(session.config), device=session.world.device)
    left, notes = dead.remove(model, kept, example, session.config.prune.min_weights)
    for note in notes:
        session.progress({"warning": f"prune.dead_neurons: nothing is removed in round {plan.round}: {note}"})
    if not session.world.same(masks.digest(left)):
        raise Agreed(f"round {plan.round}: the ranks found different dead neurons (their masks' hashes differ)")
    keep = {name: int(mask.sum()) for name, mask in left.items()}
    lost = {name: plan.keep[name] - count for name, count in keep.items()}
    return dataclasses.replace(plan, keep=keep, dead=lost), left


def reinitialise(session: Session, model: nn.Module, number: int) -> None:
    """prune.survivors=reinitialise: a network made anew, from a seed of this round, replaces the trained one."""
    config = session.config
    if config.prune.survivors == "keep":
        return
    untrained = config.model.model_copy(update={"checkpoint": None})
    seed = seeding.derive(config.seed, "survivors", number)
    model.load_state_dict(models.build(untrained, session.manifest.num_classes, seed).state_dict())


def recalibrate(session: Session, model: nn.Module) -> None:
    """prune.bn_samples: batch norm's running statistics from train samples, the same ones on every rank."""
    config = session.config
    if config.prune.bn_samples and batch_norm.norms(model):
        batch_norm.recalibrate(model, session.calibration(config.prune.bn_samples), config, session.world.device)


def dropout_rates(session: Session, model: nn.Module, kept: dict[str, Tensor]) -> dict[str, float]:
    """The rate of each dropout module in this round's retraining."""
    if not session.config.retrain.dropout_correction:
        return dropout.rates(model)
    unowned = [path for path, names in dropout.owners(model).items() if not names]
    if unowned:
        session.progress({"warning": f"retrain.dropout_correction: {', '.join(unowned)} follows no layer that can be "
                                     "found, and stays at its rate"})  # fmt: skip
    return dropout.corrected_rates(model, kept)


def teacher(session: Session, recipe: Retrain) -> nn.Module | None:
    """With retrain.distill, the dense network as it was trained, in evaluation mode."""
    if not recipe.distill:
        return None
    model = session.new_model().eval()
    model.load_state_dict(checkpoint.load(session.run, "dense/checkpoint").weights)
    return model
