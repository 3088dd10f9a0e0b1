"""A run's attempts, on small folders written through the records: what was made, where it stands, how one is undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import few_samples
import pytest
import run_files
import torch
from tiny_run import ALONE, TINY, merged
from torch import nn

from pipeline.base.errors import RunStopped
from pipeline.network.survey import survey
from pipeline.rounds import attempts
from pipeline.rounds.campaign import Origin
from pipeline.rounds.subject import Subject, prunable_weights
from pipeline.run.events import Event, Noted
from pipeline.run.layout import accepted, standing, trail
from pipeline.run.records import Judgement, RoundMetrics, RoundPlan, StartFacts
from pipeline.run.state import Run
from pipeline.settings.config import parse_config
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import Session

LOST = Judgement(drop=0.021, drop_high=0.0345, only_dense_right=21, only_pruned_right=0, samples=1000)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return few_samples.run_in(tmp_path)


def put(run: Run, number: int, attempt: int = 1, good: bool = True, folder: str | None = None) -> None:
    """An attempt at a round that kept half of what the round before kept; `folder` is where it lies in the run."""
    metrics = run_files.round_metrics(number, 0.5**number, attempt, good)
    metrics = metrics if good else replace(metrics, against_dense=LOST)
    plan = RoundPlan(round=number, attempt=attempt, planned_density=0.5**number, budget=1, tensors=())
    run.commit(plan, folder or f"rounds/{number:02d}", "plan.json")
    run.commit(metrics, folder or f"rounds/{number:02d}", "metrics.json")


def undone(run: Run, number: int, attempt: int) -> None:
    put(run, number, attempt, good=False, folder=f"rounds/{number:02d}/attempt-{attempt}")


def made(run: Run) -> list[tuple[int, int, bool]]:
    return [(each.round, each.attempt, each.accepted) for each in trail(run)]


def session_of(run: Run, heard: list[Event], **target: Any) -> Session:
    """A campaign's session, of which settling takes the run, the world and the target."""
    config = parse_config(merged({**TINY, "target": {"mode": "no-loss", **target}}, {}))
    nothing: Any = None
    return Session(config, ALONE, run, nothing, "", heard.append)


def four(session: Session) -> Subject:
    """A network of four weights."""
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    prunable, _ = survey(model)
    return Subject(session, model, prunable, prunable_weights(model, prunable), None, None, None, total=4)


def test_a_run_without_rounds_stands_at_its_dense_network(run: Run) -> None:
    assert made(run) == []
    assert accepted(run) == 0
    assert standing(run) == "dense"
    run.commit({}, "start/checkpoint", "manifest.json")
    assert standing(run) == "start"  # what a branch begins with


def test_the_trail_has_undone_attempts_before_the_one_that_came_after_them(run: Run) -> None:
    put(run, 1)
    undone(run, 2, 1)
    undone(run, 2, 2)
    put(run, 2, 3)
    undone(run, 3, 1)
    assert made(run) == [(1, 1, True), (2, 1, False), (2, 2, False), (2, 3, True), (3, 1, False)]
    assert accepted(run) == 2
    assert standing(run) == "rounds/02"


def test_a_refused_attempt_counts_once_while_it_is_undone(run: Run) -> None:
    put(run, 1)
    put(run, 2, good=False)
    assert made(run) == [(1, 1, True), (2, 1, False)]
    undone(run, 2, 1)  # its record is written, and rounds/02 is not cleared yet
    assert made(run) == [(1, 1, True), (2, 1, False)]
    assert (accepted(run), standing(run)) == (1, "rounds/01")


def test_a_round_beyond_one_that_is_missing_does_not_count(run: Run) -> None:
    put(run, 1)
    put(run, 3)
    assert made(run) == [(1, 1, True)]
    run.commit({}, "rounds/02", "plan.json")  # it is running
    assert made(run) == [(1, 1, True)]


def litter(run: Run, folder: str) -> None:
    """What an attempt leaves beside plan and metrics."""
    for part in ("checkpoint", "steps/00000010", "pruned"):
        run.commit({}, folder, part, "manifest.json")


def left_in(run: Run) -> set[str]:
    rounds = Path(run.path("rounds"))
    return {str(path.relative_to(rounds)) for path in rounds.rglob("*") if path.is_file()}


RECORD = {"02/attempt-1/plan.json", "02/attempt-1/metrics.json"}
ROUND_1 = {"01/plan.json", "01/metrics.json"}


def test_settling_undoes_the_refused_one_and_keeps_its_record(run: Run) -> None:
    put(run, 1)
    put(run, 2, good=False)
    litter(run, "rounds/02")
    metrics, plan = run.read("rounds/02/metrics.json"), run.read("rounds/02/plan.json")
    heard: list[Event] = []
    session = session_of(run, heard)
    assert not attempts.settle(session)
    assert left_in(run) == ROUND_1 | RECORD
    assert run.read("rounds/02/attempt-1/metrics.json") == metrics
    assert run.read("rounds/02/attempt-1/plan.json") == plan
    assert made(run) == [(1, 1, True), (2, 1, False)]
    density = run_files.round_metrics(2, 0.25).density
    assert heard == [
        Noted(
            f"rounds/02 at density {density:.2%} is undone: it lost 2.10 points on val, and may have lost 3.45, more "
            "than the 0.30 allowed"
        )
    ]
    assert attempts.settle(session)  # there is nothing more to undo
    assert len(heard) == 1


def test_what_was_only_measured_is_told_without_what_may_be(run: Run) -> None:
    put(run, 1, good=False)
    heard: list[Event] = []
    attempts.settle(session_of(run, heard, confidence=0.5, tolerance=0.02))
    assert "it lost 2.10 points on val, more than the 2.00 allowed" in str(heard)


def test_an_accepted_round_is_left_as_it_is(run: Run) -> None:
    put(run, 1)
    litter(run, "rounds/01")
    before = left_in(run)
    heard: list[Event] = []
    assert attempts.settle(session_of(run, heard))
    assert left_in(run) == before
    assert heard == []


@pytest.mark.parametrize("gone", [[], ["checkpoint/manifest.json"], ["plan.json"]])
def test_an_undoing_that_was_interrupted_goes_on(run: Run, gone: list[str]) -> None:
    """The record is written; of the round's own files some are gone, but metrics.json, which goes last, is there."""
    put(run, 1)
    put(run, 2, good=False)
    litter(run, "rounds/02")
    undone(run, 2, 1)
    for name in gone:
        Path(run.path("rounds/02", name)).unlink()
    assert not attempts.settle(session_of(run, []))
    assert left_in(run) == ROUND_1 | RECORD


def test_an_undoing_that_ended_is_not_made_again(run: Run) -> None:
    put(run, 1)
    undone(run, 2, 1)
    heard: list[Event] = []
    assert attempts.settle(session_of(run, heard))
    assert heard == []


def test_a_writer_whose_run_was_taken_over_undoes_nothing(run: Run) -> None:
    put(run, 1, good=False)
    litter(run, "rounds/01")
    put_record = run_files.round_metrics(1, 0.5, 1, accepted=False)
    run.commit(put_record, "rounds/01/attempt-1", "metrics.json")
    before = left_in(run)
    with pytest.raises(RunStopped, match="taken over"):
        attempts._undo(Run(run.root, run.fence - 1), put_record)
    assert left_in(run) == before


def kept(metrics: RoundMetrics, count: int, planned: float) -> RoundMetrics:
    return replace(metrics, kept=count, planned_density=planned)


def test_what_comes_next_follows_from_the_records(run: Run) -> None:
    """Of 4 weights half; that was refused, so the root of a half; that was accepted with 3, so 0.7 of 3 of 4."""
    heard: list[Event] = []
    subject = four(session_of(run, heard, smallest_step=0.95))
    first = attempts.following(subject)
    assert first is not None
    assert (first.round, first.attempt, first.density, first.budget) == (1, 1, 0.5, 2)
    run.commit(kept(run_files.round_metrics(1, 0.5, 1, False), 2, 0.5), "rounds/01/attempt-1", "metrics.json")
    second = attempts.following(subject)
    assert second is not None
    assert (second.round, second.attempt, second.budget) == (1, 2, 2)
    assert second.density == pytest.approx(0.5**0.5)
    run.commit(kept(run_files.round_metrics(1, 0.7, 2), 3, second.density), "rounds/01", "metrics.json")
    third = attempts.following(subject)
    assert third is not None
    assert (third.round, third.attempt, third.generation) == (2, 1, 2)
    assert third.density == pytest.approx(0.5**0.5 * 3 / 4)
    assert heard == []


def test_a_campaign_that_ends_with_nothing_says_so(run: Run) -> None:
    heard: list[Event] = []
    subject = four(session_of(run, heard, step=0.5, smallest_step=0.6))
    run.commit(kept(run_files.round_metrics(1, 0.5, 1, False), 2, 0.5), "rounds/01/attempt-1", "metrics.json")
    assert attempts.following(subject) is None  # the root of a half is more than 0.6
    assert heard == [Noted("no round was accepted: the network stays as it was before the first one")]


def test_a_branch_counts_from_what_it_took(run: Run) -> None:
    subject = four(session_of(run, []))
    assert attempts.origin(run, subject.prunable, subject.session.config) == Origin(4, 4)
    begun = StartFacts(
        run="first", path="runs/first", uid="beef", round=2, generation=2, weights=4, kept=3, density=0.75,
        compression=4 / 3, mlflow_run_id=None, ancestors=(), retrain=(),
    )  # fmt: skip
    run.commit(begun, "start", "start.json")
    assert attempts.origin(run, subject.prunable, subject.session.config) == Origin(3, 4, 2)
    goal = attempts.following(subject)
    assert goal is not None
    assert (goal.round, goal.density, goal.budget, goal.generation) == (1, 0.375, 1, 3)
    assert attempts.priced("bytes", Origin(3, 4, 2), 40) == Origin(40, 40, 2)
    assert attempts.priced("weights", Origin(3, 4, 2), 40) == Origin(3, 4, 2)


def test_the_fewest_weights_are_no_more_than_there_are(run: Run) -> None:
    subject = four(session_of(run, []))
    for fewest, expected in ((0, 0), (1, 1), (9, 4)):
        config = parse_config(merged(TINY, {"prune.min_weights": fewest}))
        assert attempts.floor(config.prune, subject.prunable) == expected


def test_the_network_as_it_stands_keeps_all_until_a_round_is_accepted(run: Run) -> None:
    subject = four(session_of(run, []))
    dense, pruned = torch.ones(1, 4), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    checkpoint.save(run, "dense/checkpoint", Checkpoint({"0.weight": dense}))
    found = attempts.standing_checkpoint(run, subject.prunable, subject.session.config)
    assert found.masks["0.weight"].tolist() == [[True] * 4]
    checkpoint.save(run, "rounds/01/checkpoint", Checkpoint({"0.weight": pruned}, {"0.weight": pruned != 0}))
    put(run, 1)
    put(run, 2, good=False)
    found = attempts.standing_checkpoint(run, subject.prunable, subject.session.config)
    assert torch.equal(found.weights["0.weight"], pruned)
    assert torch.equal(found.masks["0.weight"], pruned != 0)


@pytest.mark.parametrize(
    ("weight", "given", "expected"),
    [
        ([[1.0, 0.0, -2.0, 0.0]], True, [[True, False, True, False]]),
        ([[1.0, 0.0, -2.0, 0.0]], False, [[True] * 4]),  # trained here
        ([[0.0, 0.0, 0.0, 0.0]], True, [[True] * 4]),  # says nothing of which weights are needed
        ([[1.0, 2.0, 3.0, 4.0]], True, [[True] * 4]),
    ],
)
def test_zeros_of_a_network_that_was_given_are_pruned_from_the_start(
    run: Run, weight: list[list[float]], given: bool, expected: list[list[bool]]
) -> None:
    subject = four(session_of(run, []))
    config = subject.session.config
    config = config.model_copy(update={"model": config.model.model_copy(update={"trained": given})})
    found = attempts.first_masks({"0.weight": torch.tensor(weight)}, subject.prunable, config)
    assert found["0.weight"].tolist() == expected
