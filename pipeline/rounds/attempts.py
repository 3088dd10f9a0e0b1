"""A run's attempts at its rounds: which there were, which comes next, and how one is undone.

Round n lies in rounds/NN. When an attempt is undone, its plan and metrics move to rounds/NN/attempt-K, and the next
attempt uses rounds/NN. Rank 0 decides from committed files alone, so a run that was killed makes the same decision
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.network.cost import Quantity
from pipeline.network.groups import Groups
from pipeline.network.survey import Prunable
from pipeline.prune import channels, patterns
from pipeline.prune.round_plan import Goal
from pipeline.rounds import campaign
from pipeline.rounds.before_retraining import PRUNED
from pipeline.rounds.campaign import Origin, Tried
from pipeline.rounds.subject import Subject
from pipeline.run.events import Noted
from pipeline.run.layout import START, attempt_folder, round_folder, standing, trail
from pipeline.run.records import Judgement, RoundMetrics, StartFacts
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.settings.pruning import Prune
from pipeline.task.answers import Answers, Marks
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import Session

SPARSE = 0.01  # share of zeros; a few come about by chance
ANSWERS = "dense_val.npz"  # the dense network's answers on val; a campaign compares rounds with them


def standing_checkpoint(
    run: Run, prunable: Sequence[Prunable], config: Config, folder: str | None = None
) -> Checkpoint:
    """The network of the last accepted round, or of the run's start with its `first_masks`; or that in `folder`."""
    saved = checkpoint.load(run, f"{folder or standing(run)}/checkpoint")
    if not saved.masks:
        saved.masks = first_masks(saved.weights, prunable, config)
    return saved


def first_masks(weights: Mapping[str, Tensor], prunable: Sequence[Prunable], config: Config) -> dict[str, Tensor]:
    """The masks that the first round starts from: all weights, but for the zeros of a network that was given sparse.

    A tensor of it is sparse where more than SPARSE of its weights, though not all, are exactly 0.
    """
    given = was_given(config)
    pattern = patterns.of(config.prune)
    masks = {}
    for tensor in prunable:
        alive = weights[tensor.name].cpu() != 0
        kept = int(alive.sum())
        single = pattern.granularity(tensor.shape) == 1 and not pattern.channels
        sparse = given and single and 0 < kept < (1 - SPARSE) * tensor.weights
        masks[tensor.name] = alive if sparse else torch.ones_like(alive)
    return masks


def origin(run: Run, prunable: Sequence[Prunable], config: Config, dense: Mapping[str, Tensor] | None = None) -> Origin:
    """Where the first round begins: at the dense network, or at the round that the run branches from.

    `dense` has the weights of the dense network by name. If it was given sparse, its zeros are pruned already. None
    where it is still to be trained, and so will have no zeros.
    """
    total = sum(tensor.weights for tensor in prunable)
    if run.has(START, "start.json"):
        start = run.load(StartFacts, START, "start.json")
        return Origin(start.kept, total, start.generation)
    if dense is None or not was_given(config):
        return Origin(total, total)
    return Origin(sum(int(mask.sum()) for mask in first_masks(dense, prunable, config).values()), total)


def was_given(config: Config) -> bool:
    """Whether the network comes with weights, which may be sparse."""
    return config.model.checkpoint is not None or config.model.trained


def priced(unit: Quantity, begin: Origin, total: int) -> Origin:
    """Where the first round begins, in `unit`, of which the whole network costs `total`.

    A run whose budget is not of weights begins at the dense network.
    """
    if unit == "weights":
        return begin
    return Origin(total, total, begin.generation)


def beginning(subject: Subject) -> Origin:
    """Where the first round of the run begins, in the unit of target.budget."""
    config = subject.session.config
    begin = origin(subject.session.run, subject.prunable, config, subject.dense)
    return priced(config.target.budget, begin, subject.total)


def outlook(subject: Subject) -> list[Goal]:
    """All rounds of the run if each of them is accepted."""
    config = subject.session.config
    fewest = floor(config.prune, subject.prunable, subject.groups)
    return campaign.outlook(config.prune, config.target, beginning(subject), fewest)


def floor(prune: Prune, prunable: Sequence[Prunable], groups: Groups | None = None) -> int:
    """The fewest weights that prune.min_weights allows: of each tensor, or where each group keeps so many channels."""
    if groups is not None:
        least, _ = channels.bounds(prune, groups.whole)
        return sum(groups.counts(least).values())
    return sum(min(prune.min_weights, tensor.weights) for tensor in prunable)


def following(subject: Subject) -> Goal | None:
    """The next attempt, the same on every rank; None when the rounds are over."""
    session, text = subject.session, None
    if session.world.first:
        run, config = session.run, session.config
        tried = [Tried(metrics.planned_density, metrics.kept, metrics.accepted) for metrics in trail(run)]
        fewest = floor(config.prune, subject.prunable, subject.groups)
        goal = campaign.following(config.prune, config.target, beginning(subject), fewest, tried)
        text = json.dumps(None if goal is None else asdict(goal)).encode()
        if goal is None and not any(each.accepted for each in tried):
            session.progress(Noted("no round was accepted: the network stays as it was before the first one"))
    goal_or_none = json.loads(session.world.broadcast(text))
    return None if goal_or_none is None else Goal(**goal_or_none)


def note_dense_answers(session: Session, model: nn.Module) -> None:
    """In a campaign without loss, save the answers on val of `model`, the dense network, to judge the rounds by."""
    if not session.config.target.no_loss or session.run.has("rounds", ANSWERS):
        return
    answers = session.evaluate(model, "val")
    if session.world.first:
        session.run.commit_bytes(answers.save(), "rounds", ANSWERS)
    session.world.barrier()


def judge(session: Session, answers: Answers) -> Judgement | None:
    """In a campaign without loss, compare a round's answers on val with the dense network's; else None."""
    if not session.config.target.no_loss:
        return None
    dense = Marks.load(storage.read_bytes(session.run.path("rounds", ANSWERS)))
    both = dense.valid & answers.valid
    return campaign.judge(dense.right[both], answers.right[both], session.config.target)


def settle(session: Session) -> bool:
    """Undo the last attempt if it was refused, or if its undoing was interrupted. Returns False if one was undone.

    The attempt's plan and metrics are kept; its checkpoints are removed. metrics.json is removed last, so that a run
    killed in between finds the attempt again.
    """
    undone = b""
    if session.world.first:
        run = session.run
        made = trail(run)
        if made and not made[-1].accepted and run.has(round_folder(made[-1].round), "metrics.json"):
            undone = b"undone"
            _undo(run, made[-1])
            _tell(session, made[-1])
    undone = session.world.broadcast(undone)
    return not undone


def _undo(run: Run, metrics: RoundMetrics) -> None:
    folder, record = round_folder(metrics.round), attempt_folder(metrics.round, metrics.attempt)
    if not run.has(record, "metrics.json"):
        run.commit(run.read(folder, "plan.json"), record, "plan.json")
        run.commit(metrics, record, "metrics.json")
    for part in ("checkpoint", "steps", PRUNED):
        run.remove_tree(folder, part)
    for name in ("plan.json", "metrics.json"):
        run.remove(folder, name)


def _tell(session: Session, metrics: RoundMetrics) -> None:
    found, target = metrics.against_dense, session.config.target
    assert found is not None, "only a campaign refuses a round"
    lost = f"lost {100 * found.drop:.2f} points on val"
    if target.confidence > 0.5:
        lost += f", and may have lost {100 * found.drop_high:.2f}"
    place = f"{round_folder(metrics.round)} at density {metrics.density:.2%}"
    session.progress(Noted(f"{place} is undone: it {lost}, more than the {100 * target.allowed:.2f} allowed"))
