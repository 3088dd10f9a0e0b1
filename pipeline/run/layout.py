"""Where a run's rounds lie in its folder, which of them were made, and where the run stands."""

from __future__ import annotations

from itertools import count

from pipeline.run.records import RoundMetrics
from pipeline.run.state import Run

DENSE = "dense"


NO_ONNX = "final/no-onnx.json"  # why the final network has no ONNX form, once that was tried
CODEBOOK = "rounds/codebook"  # the network whose values are shared, after the last round
START = "start"  # what a run that branched off from another begins with; `pipeline.rounds.branch` fills it


def round_folder(number: int) -> str:
    """Where round `number` (from 1) lies in the run."""
    return f"rounds/{number:02d}"


def attempt_folder(number: int, attempt: int) -> str:
    """Where the record of an attempt that was undone lies in the run."""
    return f"{round_folder(number)}/attempt-{attempt}"


def control_folder(generation: int) -> str:
    """Where the dense control with the training of so many rounds lies in the run."""
    return f"rounds/control-{generation:02d}"


def trail(run: Run) -> list[RoundMetrics]:
    """metrics.json of every finished attempt, undone ones too, in the order in which they were made."""
    found: list[RoundMetrics] = []
    for number in count(1):
        attempt = 1
        while run.has(attempt_folder(number, attempt), "metrics.json"):
            found.append(run.load(RoundMetrics, attempt_folder(number, attempt), "metrics.json"))
            attempt += 1
        if not run.has(round_folder(number), "metrics.json"):
            return found
        metrics = run.load(RoundMetrics, round_folder(number), "metrics.json")
        if metrics.accepted or metrics.attempt == attempt:  # else it was undone, and its folder is not cleared yet
            found.append(metrics)
        if not metrics.accepted:
            return found
    raise AssertionError("unreachable")


def accepted(run: Run) -> int:
    """How many rounds were accepted so far. They are numbered from 1."""
    return sum(metrics.accepted for metrics in trail(run))


def standing(run: Run) -> str:
    """The folder whose checkpoint is the network as it stands: the last accepted round's, or where the run began."""
    number = accepted(run)
    if number:
        return round_folder(number)
    return START if run.has(START, "checkpoint", "manifest.json") else DENSE


def handed_over(run: Run) -> str:
    """The folder whose checkpoint is the network that is handed over: that with shared values, or as it stands."""
    return CODEBOOK if run.has(CODEBOOK, "metrics.json") else standing(run)
