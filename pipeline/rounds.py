"""The method, told aloud. SPMD: every rank runs it in lockstep, rank 0 writes.

`dense` trains the network that is to be pruned; `prune` plans a round, takes the masks that rank 0 made,
retrains what is left, evaluates, checks, and goes on to the next; then the dense control gets the same
training, and the test set is looked at, once.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import cost, models, prepare
from pipeline.data import storage
from pipeline.data.loader import EvalLoader
from pipeline.errors import Agreed, UserError
from pipeline.models import Prunable
from pipeline.prepare import Pruned
from pipeline.prune import criteria, masks, round_plan
from pipeline.prune.round_plan import RoundPlan
from pipeline.session import Session
from pipeline.state import now_ms
from pipeline.train import checkpoint, dropout
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.evaluate import forward
from pipeline.train.loop import Training

ACTIVITY_SAMPLES = 1000


def dense(session: Session) -> None:
    """Train the dense network, or take it as its checkpoint gives it, and evaluate it on val."""
    config, clock = session.config, time.monotonic()
    model = session.new_model()
    prunable, _ = models.survey(model, config.prune.include, config.prune.exclude)
    history: list[dict[str, Any]] = []
    if config.dense.epochs:
        training = Training(session, model, config.dense, "dense", "dense", [t.name for t in prunable])
        history = training.fit().history
    elif config.model.checkpoint is None:
        raise UserError("dense.epochs=0 and no model.checkpoint: there is nothing trained to prune; set one of them")
    val = session.evaluate(model, "val").metrics()
    if not session.world.first:
        return
    checkpoint.save(session.run, "dense/checkpoint", Checkpoint(dict(model.state_dict())))
    seconds = time.monotonic() - clock
    metrics = {"val": val, "history": history, "seconds": round(seconds, 3), "finished_ms": now_ms()}
    session.run.commit(metrics, "dense", "metrics.json")
    checkpoint.keep_last(session.run, "dense", 0)


def prune(session: Session) -> None:
    """All rounds, the dense control, and the one look at test; each part is skipped where it is finished."""
    model = session.new_model()
    model.load_state_dict(checkpoint.load(session.run, "dense/checkpoint").weights)
    prunable, _ = models.survey(model, session.config.prune.include, session.config.prune.exclude)
    dense_weights = {name: weight.clone() for name, weight in prunable_weights(model, prunable).items()}
    alive = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense_weights.items()}
    for number in range(1, len(round_plan.densities(session.config)) + 1):
        alive = one_round(session, model, prunable, dense_weights, alive, number)
    if session.config.prune.dense_control:
        control(session)
    look_at_test(session)
    if session.world.first and not session.run.has("final", "activity.json"):
        measure_activity(session, prunable)
    session.world.barrier()


def one_round(
    session: Session,
    model: nn.Module,
    prunable: list[Prunable],
    dense_weights: dict[str, Tensor],
    alive: dict[str, Tensor],
    number: int,
    folder: str | None = None,
) -> dict[str, Tensor]:
    """Plan, mask, retrain, evaluate, check and save one round; or load it where it is finished.

    It lies in `folder`, by default that of round `number`.
    """
    folder, run, clock = folder or round_folder(number), session.run, time.monotonic()
    if run.has(folder, "metrics.json"):
        saved = checkpoint.load(run, f"{folder}/checkpoint")
        model.load_state_dict(saved.weights)
        return {name: mask.to(session.world.device) for name, mask in saved.masks.items()}
    pruned = prepare.kept_before(session, model, folder)
    if pruned is None:
        pruned = prune_once(session, model, prunable, dense_weights, alive, number, folder)
        prepare.keep(session, model, folder, pruned)
    plan, kept, fits = pruned
    before = session.evaluate(model, "val").metrics()
    rates = prepare.dropout_rates(session, model, kept)
    count, dead = sum(plan.keep.values()), sum(plan.dead.values())
    density = count / sum(mask.numel() for mask in kept.values())
    event = {"phase": folder, "density": density, "kept": count, "dead": dead, "before": before["top1"]}
    session.progress(event | {"dropout": rates})
    training = Training(session, model, session.config.retrain, folder, folder, list(kept), kept)
    with dropout.use(model, rates):
        position = training.fit()
    training.applier.clean()
    guard(session, prunable_weights(model, prunable), kept, plan)
    val = session.evaluate(model, "val").metrics()
    if session.world.first:
        checkpoint.save(run, f"{folder}/checkpoint", Checkpoint(dict(model.state_dict()), kept))
        facts = round_facts(plan, kept, before, val)
        seconds = round(time.monotonic() - clock, 3)
        facts |= {"dead": dead, "dropout": rates, "reconstruction": fits}
        facts |= {"history": position.history, "steps": position.step, "seconds": seconds, "finished_ms": now_ms()}
        run.commit(facts, folder, "metrics.json")
        checkpoint.keep_last(run, folder, 0)
        prepare.drop(session, folder)
    session.world.barrier()
    return kept


def prune_once(
    session: Session,
    model: nn.Module,
    prunable: list[Prunable],
    dense_weights: dict[str, Tensor],
    alive: dict[str, Tensor],
    number: int,
    folder: str,
) -> Pruned:
    """Plan and mask, and all that comes before the retraining."""
    needed = prepare.statistics(session, model, [tensor.name for tensor in prunable])
    plan = plan_round(session, model, prunable, dense_weights, alive, number, needed)
    kept = shared_masks(session, plan, prunable_weights(model, prunable), alive, needed)
    before = prepare.reference(session, model)
    plan, kept = prepare.remove_dead(session, model, plan, kept)
    if session.world.first:
        session.run.commit(plan.as_json(prunable), folder, "plan.json")
    prepare.reinitialise(session, model, number)
    apply_masks(model, kept)
    fits = prepare.reconstruct(session, model, before, kept)
    prepare.recalibrate(session, model)
    return Pruned(plan, kept, fits)


def plan_round(
    session: Session,
    model: nn.Module,
    prunable: list[Prunable],
    dense_weights: dict[str, Tensor],
    alive: dict[str, Tensor],
    number: int,
    statistics: dict[str, Tensor],
) -> RoundPlan:
    """The plan of a round, the same on every rank, since all hold the same weights and statistics of them."""
    qualities = None
    if round_plan.needs_scan(session.config):
        qualities = {tensor["name"]: tensor["quality"] for tensor in session.run.read("scan", "scan.json")["tensors"]}
    weights = prunable_weights(model, prunable)
    return round_plan.make(session.config, number, weights, dense_weights, alive, qualities, statistics)


def shared_masks(
    session: Session,
    plan: RoundPlan,
    weights: dict[str, Tensor],
    alive: dict[str, Tensor],
    statistics: dict[str, Tensor],
) -> dict[str, Tensor]:
    """The masks that rank 0 made, on every rank. Raises Agreed if the ranks' hashes differ."""
    packed = None
    if session.world.first:
        ranking = criteria.scores(session.config.prune.criterion, weights, session.config.seed, statistics)
        made = {name: masks.top_mask(ranking[name], alive[name], plan.keep[name]) for name in weights}
        packed = masks.pack_bits({name: mask.cpu() for name, mask in made.items()})
    packed = session.world.broadcast(packed)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    received = masks.unpack_bits(packed, shapes)
    if not session.world.same(masks.digest(received)):
        raise Agreed(f"round {plan.round}: the ranks hold different masks (their hashes differ)")
    return {name: mask.to(session.world.device) for name, mask in received.items()}


def guard(session: Session, weights: dict[str, Tensor], kept: dict[str, Tensor], plan: RoundPlan) -> None:
    """Raise Agreed, on every rank, if a pruned weight is not 0, a count is off, or masks differ."""
    on_cpu = {name: mask.cpu() for name, mask in kept.items()}
    problems = masks.check({name: weight.cpu() for name, weight in weights.items()}, on_cpu, plan.keep)
    session.world.agree("; ".join([f"round {plan.round}: {problem}" for problem in problems]) or None)
    if not session.world.same(masks.digest(on_cpu)):
        raise Agreed(f"round {plan.round}: the ranks hold different masks after retraining (their hashes differ)")


def control(session: Session) -> None:
    """Train the dense network on for the same steps, recipe and batches as all rounds together."""
    run = session.run
    if run.has("rounds", "control.json"):
        return
    model, clock = session.new_model(), time.monotonic()
    model.load_state_dict(checkpoint.load(run, "dense/checkpoint").weights)
    prunable, _ = models.survey(model, session.config.prune.include, session.config.prune.exclude)
    history: list[dict[str, Any]] = []
    for number in range(1, len(round_plan.densities(session.config)) + 1):
        folder = f"rounds/control-{number:02d}"
        if run.has(folder, "checkpoint", "manifest.json"):
            saved = checkpoint.load(run, f"{folder}/checkpoint")
            model.load_state_dict(saved.weights)
            history += saved.state["history"]
            continue
        names = [tensor.name for tensor in prunable]
        position = Training(session, model, session.config.retrain, folder, round_folder(number), names).fit()
        history += position.history
        if session.world.first:
            state = {"history": position.history}
            checkpoint.save(run, f"{folder}/checkpoint", Checkpoint(dict(model.state_dict()), state=state))
            checkpoint.keep_last(run, folder, 0)
        session.world.barrier()
    val = session.evaluate(model, "val").metrics()
    if session.world.first:
        seconds = round(time.monotonic() - clock, 3)
        run.commit({"val": val, "history": history, "seconds": seconds, "finished_ms": now_ms()}, "rounds/control.json")
    session.world.barrier()


def look_at_test(session: Session) -> None:
    """Evaluate dense, dense control and pruned on test, keep each answer by sample, and count the look."""
    run, config = session.run, session.config
    if run.has("final", "test.json"):
        return
    rounds = len(round_plan.densities(config))
    states = {"dense": "dense/checkpoint", "pruned": f"{round_folder(rounds)}/checkpoint"}
    if config.prune.dense_control:
        states["dense_control"] = f"rounds/control-{rounds:02d}/checkpoint"
    metrics, arrays = {}, {}
    for name, folder in states.items():
        model = session.new_model()
        model.load_state_dict(checkpoint.load(run, folder).weights)
        answers = session.evaluate(model, "test")
        metrics[name] = answers.metrics()
        arrays[f"{name}_right"] = answers.right
        arrays["valid"] = answers.valid
    if session.world.first:
        record_look(session, "final evaluation")
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        run.commit_bytes(buffer.getvalue(), "final", "test_answers.npz")
        run.commit({"samples": int(arrays["valid"].sum()), **metrics}, "final", "test.json")
    session.world.barrier()


def record_look(session: Session, reason: str) -> None:
    """Append a line to test_looks.jsonl: every look at test is counted."""
    run = session.run
    path = run.path("test_looks.jsonl")
    lines = storage.read_bytes(path) if storage.exists(path) else b""
    line = json.dumps({"time_ms": now_ms(), "reason": reason})
    run.commit_bytes(lines + line.encode() + b"\n", "test_looks.jsonl")


def measure_activity(session: Session, prunable: list[Prunable]) -> None:
    """Activation density of the pruned network on some of val, for the paper's Act% and FLOP% (tables 2-5)."""
    rounds = len(round_plan.densities(session.config))
    model = session.new_model().eval()
    model.load_state_dict(checkpoint.load(session.run, f"{round_folder(rounds)}/checkpoint").weights)
    data = EvalLoader(session.split("val"), session.config.data, limit=ACTIVITY_SAMPLES, seed=session.config.seed)
    with cost.ActivationMeter(model, [tensor.name for tensor in prunable]) as meter, torch.inference_mode():
        for batch in data.batches(0, 1):
            forward(model, batch.images.to(session.world.device), session.config)
    rows = [
        {
            "name": name,
            "output_density": found.output_density,
            "input_density": found.input_density,
            "measured": found.measured,
        }
        for name, found in meter.result().items()
    ]
    session.run.commit(rows, "final", "activity.json")


def round_folder(number: int) -> str:
    """Where round `number` (from 1) lies in the run."""
    return f"rounds/{number:02d}"


def prunable_weights(model: nn.Module, prunable: list[Prunable]) -> dict[str, Tensor]:
    """The prunable tensors of a model by name, detached."""
    parameters = dict(model.named_parameters())
    return {tensor.name: parameters[tensor.name].detach() for tensor in prunable}


@torch.no_grad()
def apply_masks(model: nn.Module, kept: dict[str, Tensor]) -> None:
    """Set every pruned weight to 0."""
    parameters = dict(model.named_parameters())
    masks.Applier([parameters[name].data for name in kept], list(kept.values())).clean()


def round_facts(
    plan: RoundPlan, kept: dict[str, Tensor], before: dict[str, Any], val: dict[str, Any]
) -> dict[str, Any]:
    """The measured part of metrics.json: counted from the masks, not taken from the plan."""
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    sizes = {name: mask.numel() for name, mask in kept.items()}
    total, left = sum(sizes.values()), sum(counts.values())
    return {
        "round": plan.round,
        "attempt": 1,
        "accepted": True,
        "planned_density": plan.density,
        "density": left / total,
        "compression": total / left,
        "kept": left,
        "weights": total,
        "val_before_retrain": {"top1": before["top1"], "loss": before["loss"]},
        "val": val,
        "mask_digest": f"{masks.digest({name: mask.cpu() for name, mask in kept.items()}):016x}",
        "layers": [
            {"name": name, "weights": sizes[name], "kept": counts[name], "density": counts[name] / sizes[name]}
            for name in kept
        ],
    }
