"""The verdict of a run, from its figures on test."""

from __future__ import annotations

import pytest
from run_files import answers

from pipeline.results.final import judgement
from pipeline.run.result import OnTest, Paired, Scores


def on_test(dense: float, drop: tuple[float, float], largest: float | None = 0.1) -> OnTest:
    scores = Scores.of(answers(dense))
    paired = Paired(only_dense_right=0, only_pruned_right=0, p_value=1.0, drop_ci95=drop)
    return OnTest(samples=1000, dense=scores, dense_control=None, pruned=scores, mcnemar=paired, largest_class=largest)


@pytest.mark.parametrize(
    ("dense", "drop", "unpruned", "verdict"),
    [
        (0.9, (-0.002, 0.002), False, "no loss"),
        (0.9, (0.01, 0.02), True, "no loss"),  # the dense network to the bit
        (0.1, (-0.002, 0.002), False, "undecided"),  # it guesses
        (0.1, (-0.002, 0.002), True, "undecided"),
        (0.1, (0.01, 0.02), False, "loss"),
    ],
)
def test_a_network_that_guesses_has_lost_nothing_and_shown_nothing(
    dense: float, drop: tuple[float, float], unpruned: bool, verdict: str
) -> None:
    assert judgement(on_test(dense, drop), unpruned, 0.003) == verdict


def test_older_results_do_not_know_the_largest_class() -> None:
    assert judgement(on_test(0.1, (0.0, 0.0), largest=None), False, 0.003) == "no loss"
