"""The metrics of a run in MLflow, in groups: train/, val/, control/, round/, compression/, test/, final/.

Those of trainings stand on one axis, the updates of the whole run: dense, rounds, control, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.results import outcome
from pipeline.run.contents import Contents
from pipeline.run.course import Moment, placed
from pipeline.run.events import Busy
from pipeline.run.layout import DENSE, control_folder
from pipeline.run.records import DenseMetrics, Epoch, RoundMetrics
from pipeline.run.result import Result

_CONTROL = "rounds/control"  # what the control's phases begin with


@dataclass(frozen=True)
class Point:
    """One value of one metric. `when` is in milliseconds since 1970 and comes from the run, so that a retry adds
    nothing."""

    key: str
    value: float
    step: int
    when: int


def of_run(run: Contents) -> Iterator[Point]:
    """All metrics of the run as a whole."""
    yield from _trainings(run)
    yield from _rounds(run)
    if run.result is not None:
        # Step = looks at test, so that a later look stands after the one before, not beside it.
        yield from _numbers(_outcome(run.result), run.result.test_looks, run.finished_ms)


def of_round(metrics: RoundMetrics) -> Iterator[Point]:
    """The metrics of an attempt at a round: what it came to, and its retraining by its own updates."""
    yield from came_to(metrics)
    for moment in _told(metrics, "", metrics.density):
        yield from _training(moment, moment.step)


def came_to(metrics: RoundMetrics) -> Iterator[Point]:
    """What an attempt at a round came to."""
    outcome = _round(metrics) | {"round/val_loss": metrics.val.loss, "round/seconds": metrics.seconds}
    yield from _numbers(outcome, metrics.round, metrics.finished_ms)


def of_machines(lines: Sequence[Busy], created_ms: int) -> list[Point]:
    """MLflow's system metrics, of lines of the machines' journal. The step is in seconds since the run was created."""
    return [
        Point(f"system/{busy.node}/{name}", value, max(0, busy.ms - created_ms) // 1000, busy.ms)
        for busy in lines
        for name, value in busy.values.items()
    ]


def _trainings(run: Contents) -> Iterator[Point]:
    """What the run's course tells, and of parts that are older than it, what their own files tell."""
    told = {moment.phase for moment in run.course}
    before = run.course[0].ms if run.course else run.finished_ms + 1
    moments: list[Moment] = []
    if run.dense is not None and DENSE not in told:
        moments += _told(run.dense, DENSE, 1.0)
    for each in run.rounds:
        if each.metrics is not None and each.metrics.finished_ms < before:
            moments += _told(each.metrics, each.folder, each.metrics.density)
    moments += run.course
    if run.control is not None and not any(phase.startswith(_CONTROL) for phase in told):
        moments += _told(run.control, control_folder(1), 1.0)
    for stood in placed(moments):
        yield from _training(stood.moment, stood.at)


def _training(moment: Moment, step: int) -> Iterator[Point]:
    """Points of one moment. The control has a loss and an accuracy alone: its recipe is that of the rounds."""
    if moment.phase.startswith(_CONTROL):
        found = {"control/loss": moment.loss, "control/val_accuracy": moment.val_top1}
    else:
        found = {
            "train/loss": moment.loss,
            "train/lr": moment.lr,
            "train/images_per_s": moment.images_per_s,
            "train/waiting_for_data": moment.waiting,
            "train/density": moment.density,
            "val/accuracy": moment.val_top1,
        }
    yield from _numbers(found, step, moment.ms)


def _told(part: DenseMetrics | RoundMetrics, phase: str, density: float) -> list[Moment]:
    """The epochs that a finished part's own file tells of. Each one's time is counted back from the part's end.

    Where the updates begin anew, as in the control after each generation, a phase of its own begins.
    """
    left, found = 0.0, []
    starts: list[int] = []
    for i, epoch in enumerate(part.history):
        if i and epoch.step <= part.history[i - 1].step:
            starts.append(i)
    for i, epoch in reversed(list(enumerate(part.history))):
        generation = sum(i >= start for start in starts)
        name = f"{phase}.{generation}" if generation else phase
        found.append(_moment(epoch, name, density, part.finished_ms - round(1000 * left)))
        left += epoch.seconds
    return found[::-1]


def _moment(epoch: Epoch, phase: str, density: float, when: int) -> Moment:
    return Moment(
        when, phase, epoch.step, epoch.step, density, epoch.loss, epoch.lr, epoch.images_per_s, epoch.waiting,
        epoch.val_top1,
    )  # fmt: skip


def _rounds(run: Contents) -> Iterator[Point]:
    """`round/*`, step = round, the dense network as round 0; and accuracy with step = compression, to be read off."""
    if run.dense is not None:
        start = {
            "round/density": 1.0,
            "round/sparsity": 0.0,
            "round/compression": 1.0,
            "round/val_accuracy": run.dense.val.top1,
        }
        yield from _numbers(start, 0, run.dense.finished_ms)
        yield from _numbers({"compression/val_accuracy": run.dense.val.top1}, 1, run.dense.finished_ms)
    for metrics in run.finished_rounds:
        if metrics.accepted:
            yield from _numbers(_round(metrics), metrics.round, metrics.finished_ms)
            reached = {"compression/val_accuracy": metrics.val.top1}
            yield from _numbers(reached, round(metrics.compression), metrics.finished_ms)


def _round(metrics: RoundMetrics) -> dict[str, float]:
    return {
        "round/density": metrics.density,
        "round/sparsity": 1 - metrics.density,
        "round/compression": metrics.compression,
        "round/val_accuracy": metrics.val.top1,
        "round/val_accuracy_before_retraining": metrics.val_before_retrain.top1,
    }


def _outcome(result: Result) -> dict[str, float | None]:
    """The final numbers; result.json, which MLflow has too, holds more."""
    return {
        "final/compression": result.compression,
        "final/flops_left": result.flops_density_weights,
        "final/packed_bytes": result.bytes.packed,
        **on_test(result),
    }


def on_test(result: Result) -> dict[str, float | None]:
    """The metrics of the one evaluation on test."""
    test = result.test
    low, high = test.mcnemar.drop_ci95
    return {
        "test/accuracy": test.pruned.top1,
        "test/dense_accuracy": test.dense.top1,
        "test/control_accuracy": None if test.dense_control is None else test.dense_control.top1,
        "test/drop": outcome.drop(result),
        "test/drop_low": low,
        "test/drop_high": high,
    }


def _numbers(values: Mapping[str, float | None], step: int, when: int) -> Iterator[Point]:
    """Points for the values that were measured; a null is left out."""
    for key, value in values.items():
        if value is not None:
            yield Point(key, float(value), step, when)
