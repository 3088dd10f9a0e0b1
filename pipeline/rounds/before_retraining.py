"""The steps between a prune and its retraining. Each has its own setting; every rank does the same."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from pipeline.base import seeding
from pipeline.base.errors import Agreed, UserError
from pipeline.base.record import plain
from pipeline.calibrate import batch_norm, statistics
from pipeline.calibrate import reconstruct as reconstruction
from pipeline.network import dead, dropout
from pipeline.network.build import build_network
from pipeline.network.modes import evaluating
from pipeline.network.trace import graph_of
from pipeline.prune import criteria, masks
from pipeline.run.events import Noted, Warned
from pipeline.run.records import Fit, RoundPlan
from pipeline.settings.pruning import Prune
from pipeline.settings.training import Retrain
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import Session

PRUNED = "pruned"  # the folder, within a round's folder, of the network before its retraining


class Pruned(NamedTuple):
    """A round before its retraining, without the network: plan, masks by tensor, and the errors of reconstruction."""

    plan: RoundPlan
    kept: dict[str, Tensor]
    fits: list[Fit]


def rests_on_samples(prune: Prune) -> bool:
    """Whether masks or survivors depend on sums over samples: their last bits change with the number of ranks."""
    return bool(prune.reconstruct_samples or criteria.of(prune).statistic)


def check(model: nn.Module, prune: Prune, names: list[str], outside: Collection[str] = ()) -> None:
    """Raise UserError if the statistics or the reconstruction of the config are impossible for this network.

    `outside` names tensors that are used outside of a call of their layer.
    """
    statistics.require(model, names, prune, outside)
    if prune.reconstruct_samples:
        with evaluating(model):
            graph, notes = graph_of(model)
        if graph is None:
            raise UserError(
                f"prune.reconstruct_samples={prune.reconstruct_samples} needs a network that can be run step by "
                f"step, but {notes[0]}; set it to 0"
            )


def keep(session: Session, model: nn.Module, folder: str, pruned: Pruned) -> None:
    """Save a pruned network until it is retrained, if another number of ranks would not reproduce it to the bit."""
    if session.world.first and rests_on_samples(session.config.prune):
        state = {"plan": pruned.plan.to_json(), "fits": plain(pruned.fits)}
        saved = Checkpoint(dict(model.state_dict()), pruned.kept, state=state)
        checkpoint.save(session.run, f"{folder}/{PRUNED}", saved)
    session.world.barrier()


def kept_before(session: Session, model: nn.Module, folder: str) -> Pruned | None:
    """Load into `model` the pruned network of a round whose retraining was stopped; None if `keep` saved none."""
    where = f"{folder}/{PRUNED}"
    if not rests_on_samples(session.config.prune) or not session.run.has(where, "manifest.json"):
        return None
    saved = checkpoint.load(session.run, where)
    model.load_state_dict(saved.weights)
    kept = {name: mask.to(session.world.device) for name, mask in saved.masks.items()}
    origin = session.run.path(where)
    fits = [Fit.from_json(fit, origin) for fit in saved.state["fits"]]
    return Pruned(RoundPlan.from_json(saved.state["plan"], origin), kept, fits)


def drop(session: Session, folder: str) -> None:
    """Remove what `keep` saved."""
    session.run.remove_tree(folder, PRUNED)


def remove_dead(
    session: Session, model: nn.Module, plan: RoundPlan, kept: dict[str, Tensor]
) -> tuple[RoundPlan, dict[str, Tensor]]:
    """prune.dead_neurons: the plan and masks without the connections of dead units; the plan's `dead` counts them."""
    if not session.config.prune.dead_neurons:
        return plan, kept
    left = without_dead(session, model, kept, plan.round, set())
    keep = {name: int(mask.sum()) for name, mask in left.items()}
    return plan.without_dead(keep), left


def without_dead(
    session: Session, model: nn.Module, kept: dict[str, Tensor], number: int, told: set[str]
) -> dict[str, Tensor]:
    """The masks of round `number` without the connections of dead units.

    If the network cannot be traced, the masks stay as they are, with a warning; warnings in `told` are not repeated.
    Constant contributions of dead units move into biases of `model`. Raises Agreed if the ranks' masks differ.
    """
    example = session.feed.zeros(2, session.world.device)
    left, notes = dead.remove(model, kept, example, session.config.prune.min_weights)
    for note in notes:
        if note not in told:
            session.progress(Warned(f"prune.dead_neurons: nothing is removed in round {number}: {note}"))
    told.update(notes)
    if not session.world.same(masks.digest(left)):
        raise Agreed(f"round {number}: the ranks found different dead neurons (their masks' hashes differ)")
    return left


def reference(session: Session, model: nn.Module) -> nn.Module | None:
    """A copy of the network before the prune, for `reconstruct`; None where prune.reconstruct_samples is 0."""
    return copy.deepcopy(model) if session.config.prune.reconstruct_samples else None


def reconstruct(session: Session, model: nn.Module, before: nn.Module | None, kept: dict[str, Tensor]) -> list[Fit]:
    """prune.reconstruct_samples: set survivors so that each layer gives what it gave in the network `before` the prune.

    Returns the errors of each tensor's layer, masked and reconstructed; an empty list where the setting is 0.
    """
    if before is None:
        return []
    samples = session.config.prune.reconstruct_samples
    batches = [batch for batch in session.calibration(samples, share=True) if bool((batch.weights > 0).any())]
    fits, notes = reconstruction.reconstruct(model, before, kept, batches, session.feed, session.world)
    for note in notes:
        session.progress(Warned(f"prune.reconstruct_samples: {note}: it is only masked, not reconstructed"))
    if fits:
        masked, left = (float(np.median([getattr(fit, key) for fit in fits])) for key in ("masked", "reconstructed"))
        count = min(samples, len(session.split("train")))
        text = f"{len(fits)} layers reconstructed on {count:,} train samples; median squared error was {masked:.2%} of"
        session.progress(Noted(f"{text} a layer's squared output, and is now {left:.2%}"))
    return fits


def reinitialise(session: Session, model: nn.Module, number: int) -> None:
    """prune.survivors=reinitialise: a new network, initialised from a seed of this round, replaces the trained one."""
    config = session.config
    if config.prune.survivors == "keep":
        return
    untrained = config.model.model_copy(update={"checkpoint": None})
    seed = seeding.derive(config.seed, "survivors", number)
    model.load_state_dict(build_network(untrained, session.manifest.num_classes, seed).state_dict())


def recalibrate(session: Session, model: nn.Module) -> None:
    """prune.bn_samples: estimate batch norm's running statistics again from train samples, the same on every rank."""
    config = session.config
    if config.prune.bn_samples and batch_norm.norms(model):
        batch_norm.recalibrate(model, session.calibration(config.prune.bn_samples), session.feed, session.world.device)


def dropout_rates(session: Session, model: nn.Module, keep: dict[str, int]) -> dict[str, float]:
    """The rate of each dropout module in this round's retraining."""
    if not session.config.retrain.dropout_correction:
        return dropout.rates(model)
    unowned = [path for path, names in dropout.owners(model).items() if not names]
    if unowned:
        text = f"retrain.dropout_correction: {', '.join(unowned)} follows no layer that can be found"
        session.progress(Warned(f"{text}, and stays at its rate"))
    return dropout.corrected_rates(model, keep)


def teacher(session: Session, recipe: Retrain) -> nn.Module | None:
    """With retrain.distill, the dense network as it was trained, in evaluation mode."""
    if not recipe.distill:
        return None
    model = session.new_model().eval()
    model.load_state_dict(checkpoint.load(session.run, "dense/checkpoint").weights)
    return model
