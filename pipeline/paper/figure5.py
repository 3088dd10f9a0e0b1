"""Figure 5's measurements: the dense network pruned in one shot and retrained at each density, and a chain of rounds.

It is a stage of an ordinary run (shards, dense, scan, figure5): it runs on the same engines, resumes in the same way,
and holds all points in one worker group. A point is a round of `pipeline.rounds.method`. Its measurement before
retraining is a point of the curve without retraining, so that curve costs nothing.
"""

from __future__ import annotations

from typing import Any

from pipeline import stages
from pipeline.base.errors import UserError
from pipeline.paper.curves import Measured
from pipeline.prune import schedules
from pipeline.rounds import attempts, method
from pipeline.rounds.subject import open_subject
from pipeline.run.layout import round_folder
from pipeline.run.records import DataFacts, DenseMetrics, RoundMetrics
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.train import checkpoint
from pipeline.train.session import Session

REGULARISERS = ("l2", "l1")
FIGURE5 = stages.on_workers("figure5", "figure 5", stages.rounds_settings, "pipeline.paper.figure5:measure")


def variant(config: Config, regulariser: str, runs_dir: str) -> Config:
    """The run that trains and retrains with L1 alone, or with L2 alone, each as strong as the config has it.

    Raises UserError where the config has no such strength, or no list of densities.
    """
    setting, off = ("weight_decay", "l1") if regulariser == "l2" else ("l1", "weight_decay")
    for part, train in (("dense", config.dense), ("retrain", config.retrain)):
        if getattr(train, setting) == 0:
            raise UserError(
                f"{part}.{setting}=0: figure 5 compares L1 with L2; give both strengths, as in {part}.{setting}=0.0001"
            )
    if not schedules.of(config.prune).from_list:
        raise UserError(
            f"prune.schedule={config.prune.schedule}: figure 5 takes its densities from prune.list; set "
            "prune.schedule=list and prune.list=[0.5,0.2,0.1]"
        )
    changed: dict[str, Any] = {p: getattr(config, p).model_copy(update={off: 0.0}) for p in ("dense", "retrain")}
    changed["tracking"] = config.tracking.model_copy(update={"enabled": False})  # there are no rounds to mirror
    return config.model_copy(update={"name": regulariser, "runs_dir": runs_dir, **changed})


def measure(session: Session) -> None:
    """Every point, on every rank in lockstep; a finished one is skipped. The chain is for L2 alone, as in the paper."""
    subject, dense = open_subject(session), checkpoint.load(session.run, "dense/checkpoint")
    goals = attempts.outlook(subject)
    for goal in goals:
        subject.load(dense)
        method.one_round(subject, subject.everything, goal, one_shot_folder(goal.round))
    if session.config.retrain.l1 == 0:
        subject.load(dense)
        alive = subject.everything
        for goal in goals:
            alive = method.one_round(subject, alive, goal)


def one_shot_folder(number: int) -> str:
    """Where the dense network pruned at once to density `number` (from 1) of the list lies in the run."""
    return f"figure5/{number:02d}"


def read(run: Run, points: int, iterative: bool, seconds: float) -> Measured:
    """What `measure` wrote for so many densities, with or without the chain of rounds."""
    numbers = range(1, points + 1)

    def load(folder: str) -> RoundMetrics:
        return run.load(RoundMetrics, folder, "metrics.json")

    return Measured(
        dense_top1=run.load(DenseMetrics, "dense", "metrics.json").val.top1,
        samples=run.load(DataFacts, "data.json").val,
        one_shot=tuple(load(one_shot_folder(number)) for number in numbers),
        iterative=tuple(load(round_folder(number)) for number in numbers) if iterative else (),
        seconds=seconds,
    )
