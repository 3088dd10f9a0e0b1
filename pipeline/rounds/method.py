"""The method. SPMD: every rank runs it in lockstep, rank 0 writes.

`dense` trains the network that is to be pruned. `prune` runs the rounds. A round is planned, masked with the masks that
rank 0 made, retrained, evaluated and checked. Then the next round follows, or this one is undone if too much accuracy
was lost. At the end the dense control gets the same training, and the test set is looked at once.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from pipeline.base import stats
from pipeline.base.errors import Agreed
from pipeline.calibrate.statistics import statistics_for
from pipeline.data.loader import EvalLoader
from pipeline.network.activity import ActivationMeter
from pipeline.network.survey import Prunable, survey
from pipeline.prune import criteria, masks, round_plan
from pipeline.prune.gradual import Gradual
from pipeline.prune.round_plan import Goal, Standing
from pipeline.rounds import attempts, before_retraining, campaign, comparison, retraining, sharing
from pipeline.rounds.before_retraining import Pruned
from pipeline.rounds.subject import Subject, open_subject
from pipeline.run.events import Doing, Noted, RoundBegun
from pipeline.run.layout import DENSE, handed_over, round_folder
from pipeline.run.records import (
    BeforeRetraining,
    DenseMetrics,
    LayerActivity,
    LayerCount,
    RoundMetrics,
    RoundPlan,
)
from pipeline.run.state import now_ms
from pipeline.train import checkpoint, first_step
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.loop import Position, Training
from pipeline.train.session import Session

ACTIVITY_SAMPLES = 1000


def dense(session: Session) -> None:
    """Train the dense network, or take it from model.checkpoint, and evaluate it on val."""
    config, clock = session.config, time.monotonic()
    first_step.on_workers(session, DENSE)
    model = session.new_model()
    prunable, _ = survey(model, config.prune.include, config.prune.exclude)
    position = Position()
    if config.dense.epochs:
        training = Training(session, model, config.dense, "dense", "dense", [t.name for t in prunable])
        position = training.fit()
    val = session.evaluate(model, "val").metrics()
    if not session.world.first:
        return
    for note in about_dense(session, val.top1, attempts.first_masks(model.state_dict(), prunable, config)):
        session.progress(Noted(note))
    checkpoint.save(session.run, "dense/checkpoint", Checkpoint(dict(model.state_dict())))
    seconds = time.monotonic() - clock + position.earlier
    metrics = DenseMetrics(val, tuple(position.history), round(seconds, 3), now_ms(), session.manifest.identity)
    session.run.commit(metrics, "dense", "metrics.json")
    checkpoint.keep_last(session.run, "dense", 0)


def about_dense(session: Session, top1: float, alive: dict[str, Tensor]) -> list[str]:
    """What is to be known of the dense network before anything rests on it.

    `top1` is its accuracy on val, `alive` are the masks that the first round starts from.
    """
    config, labels = session.config, session.split("val").labels
    notes = [] if config.dense.epochs else [f"the dense network as it was given: val {top1:.2%}"]
    if stats.guessing(round(top1 * len(labels)), len(labels), share := comparison.largest_class(labels)):
        notes.append(
            f"the dense network is no better than guessing: it is right on {top1:.1%} of val, and always naming the "
            f"largest class is right on {share:.1%}. Nothing can be learnt from pruning it, and the verdict will not "
            "be `no loss`: check model.checkpoint, data.mean, data.std and the order of the classes, or train longer"
        )
    total = sum(mask.numel() for mask in alive.values())
    if zeros := total - sum(int(mask.sum()) for mask in alive.values()):
        notes.append(
            f"the network that was given is sparse already: {zeros:,} of its {total:,} prunable weights are 0, and "
            "count as pruned"
        )
    given = config.model.checkpoint is not None or config.model.trained
    if given and session.manifest.val_is_cut_from_train:
        notes.append(
            "val is cut from train, and the network that was given may have been trained on it: then it looks better "
            "on val than it is, and so do the scan and target.mode=no-loss. Give the data a val part of its own"
        )
    return notes


def prune(session: Session) -> None:
    """Run all rounds, share values, train the dense control, look at test once; finished parts are skipped."""
    if session.config.start.source is not None:  # no dense network was trained here
        first_step.on_workers(session, round_folder(1))
    subject = open_subject(session)
    session = subject.session
    attempts.note_dense_answers(session, subject.model)
    attempts.settle(session)
    alive = stand(subject)
    while (goal := attempts.following(subject)) is not None:
        alive = one_round(subject, alive, goal)
        if not attempts.settle(session):
            alive = stand(subject)
    sharing.share(subject)
    if session.config.prune.dense_control:
        comparison.control(session)
    comparison.look_at_test(session)
    if session.world.first and not session.run.has("final", "activity.json"):
        measure_activity(session, subject.prunable)
    session.world.barrier()


def stand(subject: Subject) -> dict[str, Tensor]:
    """Load the network of the last accepted round, or of the run's beginning, and return its masks."""
    session = subject.session
    return subject.load(attempts.standing_checkpoint(session.run, subject.prunable, session.config))


def one_round(subject: Subject, alive: dict[str, Tensor], goal: Goal, folder: str | None = None) -> dict[str, Tensor]:
    """Plan, mask, retrain, evaluate, check and save one attempt at a round; or load it if it is finished.

    The attempt is written to `folder`, which also names its order of batches. By default `folder` is the round's, and
    the round's generation names the order. A refused attempt leaves no checkpoint.
    """
    session, model = subject.session, subject.model
    order = folder or round_folder(goal.generation)
    folder, run, clock = folder or round_folder(goal.round), session.run, time.monotonic()
    if run.has(folder, "metrics.json"):
        return subject.load(checkpoint.load(run, f"{folder}/checkpoint"))
    pruned = before_retraining.kept_before(session, model, folder)
    if pruned is None:
        pruned = prune_once(subject, alive, goal, folder)
        before_retraining.keep(session, model, folder, pruned)
    plan, kept, fits = pruned
    gradual = gradually(subject, alive, goal, folder)
    rates = before_retraining.dropout_rates(session, model, plan.keep)
    session.progress(Doing(f"{folder}: evaluated on val before retraining"))
    before = session.evaluate(model, "val").metrics()
    count, dead = sum(plan.keep.values()), plan.dead
    density = count / sum(mask.numel() for mask in kept.values())
    session.progress(RoundBegun(folder, density, count, dead, before.top1, rates, gradual is not None))
    position, kept = retraining.retrain(subject, folder, order, kept, rates, gradual)
    if gradual:
        plan = run.load(RoundPlan, folder, "plan.json")
    guard(subject, kept, plan)
    session.progress(Doing(f"{folder}: evaluated on val"))
    answers = session.evaluate(model, "val")
    against_dense = attempts.judge(session, answers)
    accepted = against_dense is None or campaign.accepts(against_dense, session.config.target)
    if session.world.first:
        if accepted:
            checkpoint.save(run, f"{folder}/checkpoint", Checkpoint(dict(model.state_dict()), kept))
        layers = layer_counts(kept)
        left, total = sum(layer.kept for layer in layers), sum(layer.weights for layer in layers)
        metrics = RoundMetrics(
            round=plan.round,
            attempt=plan.attempt,
            planned_density=plan.planned_density,
            density=left / total,
            compression=total / left,
            kept=left,
            weights=total,
            val_before_retrain=BeforeRetraining(before.top1, before.loss),
            val=answers.metrics(),
            mask_digest=f"{masks.digest({name: mask.cpu() for name, mask in kept.items()}):016x}",
            layers=layers,
            accepted=accepted,
            against_dense=against_dense,
            dead=dead,
            dropout=rates,
            reconstruction=tuple(fits),
            history=tuple(position.history),
            steps=position.step,
            seconds=round(time.monotonic() - clock + position.earlier, 3),
            finished_ms=now_ms(),
            data=session.manifest.identity,
        )
        run.commit(metrics, folder, "metrics.json")
        checkpoint.keep_last(run, folder, 0)
        before_retraining.drop(session, folder)
    session.world.barrier()
    return kept


def prune_once(subject: Subject, alive: dict[str, Tensor], goal: Goal, folder: str) -> Pruned:
    """Plan, mask, and do all that comes before retraining. With prune.gradual only plan: no weight is pruned yet."""
    session, model = subject.session, subject.model
    settings, gradual = session.config.prune, session.config.prune.gradual
    if criteria.of(settings).statistic is not None:
        samples = f"{settings.statistics_samples:,} train samples"
        session.progress(Doing(f"{folder}: what prune.criterion={settings.criterion} needs is measured on {samples}"))
    needed = statistics_for(session, model, [*subject.dense])
    plan = plan_round(subject, alive, goal, needed)
    kept = alive if gradual else shared_masks(subject, plan, alive, needed)
    before = before_retraining.reference(session, model)
    if not gradual:
        plan, kept = before_retraining.remove_dead(session, model, plan, kept)
    if session.world.first and not (gradual and session.run.has(folder, "plan.json")):  # may be the last prune's
        session.run.commit(plan, folder, "plan.json")
    before_retraining.reinitialise(session, model, goal.generation)
    apply_masks(model, kept)
    if before is not None:
        session.progress(Doing(f"{folder}: layers are reconstructed on {settings.reconstruct_samples:,} train samples"))
    fits = before_retraining.reconstruct(session, model, before, kept)
    before_retraining.recalibrate(session, model)
    return Pruned(plan, kept, fits)


def plan_round(subject: Subject, alive: dict[str, Tensor], goal: Goal, statistics: dict[str, Tensor]) -> RoundPlan:
    """The plan of a round, the same on every rank, since all hold the same weights and statistics."""
    return round_plan.make(subject.basis, goal, Standing(subject.weights, alive, statistics))


def gradually(subject: Subject, alive: dict[str, Tensor], goal: Goal, folder: str) -> Gradual | None:
    """With prune.gradual, how weights are pruned during the round's retraining; the last prune rewrites plan.json.

    With prune.dead_neurons every prune first removes the connections of dead units, and keeps as many others instead.
    """
    session = subject.session
    config = session.config.prune
    if not config.gradual:
        return None
    told: set[str] = set()

    def prune(density: float, alive: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        needed = statistics_for(session, subject.model, list(alive))
        while True:
            plan = plan_round(subject, alive, goal if last else goal.at(density), needed)
            kept = shared_masks(subject, plan, alive, needed)
            if not config.dead_neurons:
                break
            left = before_retraining.without_dead(session, subject.model, kept, goal.round, told)
            dead = {name: mask & ~left[name] for name, mask in kept.items()}
            if not any(bool(mask.any()) for mask in dead.values()):
                break
            alive = {name: mask & ~dead[name] for name, mask in alive.items()}
        if last and session.world.first:
            session.run.commit(plan, folder, "plan.json")
        return kept

    return Gradual(prune, subject.share(alive), goal.density, config.gradual, config.gradual_every)


def shared_masks(
    subject: Subject, plan: RoundPlan, alive: dict[str, Tensor], statistics: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The masks that rank 0 made, on every rank. Raises Agreed if the ranks' hashes differ."""
    session, weights = subject.session, subject.weights
    packed = None
    if session.world.first:
        made = round_plan.masks(subject.basis, plan, Standing(weights, alive, statistics))
        packed = masks.pack_bits({name: mask.cpu() for name, mask in made.items()})
    packed = session.world.broadcast(packed)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    received = masks.unpack_bits(packed, shapes)
    if not session.world.same(masks.digest(received)):
        raise Agreed(f"round {plan.round}: the ranks hold different masks (their hashes differ)")
    return {name: mask.to(session.world.device) for name, mask in received.items()}


def guard(subject: Subject, kept: dict[str, Tensor], plan: RoundPlan) -> None:
    """Raise Agreed, on every rank, if a pruned weight is not 0, a count is off, or masks differ."""
    session = subject.session
    on_cpu = {name: mask.cpu() for name, mask in kept.items()}
    problems = masks.check({name: weight.cpu() for name, weight in subject.weights.items()}, on_cpu, plan.keep)
    session.world.agree("; ".join([f"round {plan.round}: {problem}" for problem in problems]) or None)
    if not session.world.same(masks.digest(on_cpu)):
        raise Agreed(f"round {plan.round}: the ranks hold different masks after retraining (their hashes differ)")


def measure_activity(session: Session, prunable: list[Prunable]) -> None:
    """Activation density of the pruned network on some of val, for the paper's Act% and FLOP% (tables 2-5)."""
    model = session.new_model().eval()
    model.load_state_dict(checkpoint.load(session.run, f"{handed_over(session.run)}/checkpoint").weights)
    data = EvalLoader(session.split("val"), session.config.data, limit=ACTIVITY_SAMPLES, seed=session.config.seed)
    with ActivationMeter(model, [tensor.name for tensor in prunable]) as meter, torch.inference_mode():
        for batch in data.batches(0, 1):
            session.feed.forward(model, batch.images.to(session.world.device))
    rows = [
        LayerActivity(name, found.output_density, found.input_density, found.measured)
        for name, found in meter.result().items()
    ]
    session.run.commit(rows, "final", "activity.json")


@torch.no_grad()
def apply_masks(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Set every pruned weight to 0."""
    parameters = dict(model.named_parameters())
    masks.Applier([parameters[name].data for name in kept], list(kept.values())).clean()


def layer_counts(kept: dict[str, Tensor]) -> tuple[LayerCount, ...]:
    """The kept weights of each tensor, counted from the masks, not taken from the plan."""
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    return tuple(
        LayerCount(name, mask.numel(), counts[name], counts[name] / mask.numel()) for name, mask in kept.items()
    )
