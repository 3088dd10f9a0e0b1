"""The fair comparison: the dense network gets the training that the pruned one got, and test is looked at, once.

SPMD, as `pipeline.rounds.method`: every rank runs it in lockstep, rank 0 writes.
"""

from __future__ import annotations

import json
import time

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.network.survey import survey
from pipeline.rounds import before_retraining, sharing
from pipeline.run.layout import control_folder, handed_over, round_folder
from pipeline.run.records import DenseMetrics, Epoch, TestMetrics
from pipeline.run.state import now_ms
from pipeline.task.answers import Answers, save_marks
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.loop import Training
from pipeline.train.session import Session

GIVES = ("final/test.json", "final/test_answers.npz")  # what the look at test leaves


def control(session: Session) -> None:
    """Train the dense network further, with the same steps, recipe and batches as all accepted rounds together.

    Where values are shared, it also gets the training that the shared values got.

    A branch's control also gets the training of the rounds before the branch, or copies the result from the source.
    """
    run = session.run
    recipes = sharing.trainings(session.config, run)
    if run.has("rounds", "control.json") or not recipes:
        return
    model, clock = session.new_model(), time.monotonic()
    model.load_state_dict(checkpoint.load(run, "dense/checkpoint").weights)
    prunable, _ = survey(model, session.config.prune.include, session.config.prune.exclude)
    names = [tensor.name for tensor in prunable]
    history: list[Epoch] = []
    earlier = 0.0  # seconds of its training in earlier processes
    for generation, recipe in enumerate(recipes, start=1):
        folder = control_folder(generation)
        if run.has(folder, "checkpoint", "manifest.json"):
            saved = checkpoint.load(run, f"{folder}/checkpoint")
            model.load_state_dict(saved.weights)
            made = [Epoch.from_json(epoch, run.path(folder)) for epoch in saved.state["history"]]
            history += made
            earlier += sum(epoch.seconds for epoch in made)
            continue
        teacher = before_retraining.teacher(session, recipe)
        training = Training(session, model, recipe, folder, round_folder(generation), names, teacher=teacher)
        position = training.fit()
        history += position.history
        earlier += position.earlier
        if session.world.first:
            state = {"history": [epoch.to_json() for epoch in position.history]}
            checkpoint.save(run, f"{folder}/checkpoint", Checkpoint(dict(model.state_dict()), state=state))
            checkpoint.keep_last(run, folder, 0)
        session.world.barrier()
    val = session.evaluate(model, "val").metrics()
    if session.world.first:
        seconds = round(time.monotonic() - clock + earlier, 3)
        metrics = DenseMetrics(val, tuple(history), seconds, now_ms(), session.manifest.identity)
        run.commit(metrics, "rounds/control.json")
    session.world.barrier()


def look_at_test(session: Session) -> None:
    """Evaluate dense, dense control and pruned network on test, save the answers by sample, and record the look."""
    run, config = session.run, session.config
    if all(run.has(file) for file in GIVES):
        return
    states = {"dense": "dense/checkpoint", "pruned": f"{handed_over(run)}/checkpoint"}
    trained = len(sharing.trainings(config, run))
    if config.prune.dense_control and trained:
        states["dense_control"] = f"{control_folder(trained)}/checkpoint"
    answers: dict[str, Answers] = {}
    for name, folder in states.items():
        model = session.new_model()
        model.load_state_dict(checkpoint.load(run, folder).weights)
        answers[name] = session.evaluate(model, "test")
    if session.world.first:
        record_look(session, "final evaluation")
        metrics = {name: each.metrics() for name, each in answers.items()}
        run.commit_bytes(save_marks(answers), "final", "test_answers.npz")
        valid = answers["pruned"].valid
        largest = largest_class(session.split("test").labels[valid])
        data = session.manifest.identity
        run.commit(TestMetrics(int(valid.sum()), **metrics, largest_class=largest, data=data), "final", "test.json")
    session.world.barrier()


def largest_class(labels: NDArray[np.int64]) -> float:
    """The share of the largest class among labels, shape (samples,): what always naming one class gets right."""
    return int(np.bincount(labels).max()) / len(labels)


def record_look(session: Session, reason: str) -> None:
    """Append a line to test_looks.jsonl: every look at test is counted."""
    run = session.run
    path = run.path("test_looks.jsonl")
    lines = storage.read_bytes(path) if storage.exists(path) else b""
    line = json.dumps({"time_ms": now_ms(), "reason": reason})
    run.commit_bytes(lines + line.encode() + b"\n", "test_looks.jsonl")
