"""Patterns, worked by hand on four numbers."""

from __future__ import annotations

import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.prune import axes, patterns
from pipeline.prune.patterns import PATTERNS, Pattern
from pipeline.settings.config import parse_config
from pipeline.settings.pruning import Prune, Target

SCORES = torch.tensor([[1.0, 4.0], [3.0, 1.0]])
ALIVE = torch.tensor([[True, True], [False, True]])


def test_weights_go_one_by_one_the_highest_of_the_living_stay() -> None:
    pattern = patterns.of(Prune())
    assert pattern.mask(SCORES, ALIVE, 2).tolist() == [[True, True], [False, False]]
    assert pattern.mask(SCORES, ALIVE, 1).tolist() == [[False, True], [False, False]]
    assert pattern.granularity(SCORES.shape) == 1


@pytest.mark.parametrize("name", PATTERNS)
def test_nested_counts_the_masks_that_keep_a_weight(name: str) -> None:
    counts = PATTERNS[name].nested(SCORES, ALIVE, [3, 2, 1])
    assert counts.tolist() == [[2, 3], [0, 1]]
    for number, keep in enumerate((3, 2, 1)):
        assert torch.equal(counts > number, PATTERNS[name].mask(SCORES, ALIVE, keep))


def test_an_unknown_pattern_is_named_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"prune.pattern='weight' is unknown; did you mean 'weights'\? known: weights"):
        axes.require_fitting(Prune.model_validate({"pattern": "weight"}), Target())


def test_a_config_that_was_written_before_there_were_patterns_prunes_weights() -> None:
    tree = parse_config({"name": "a"}).model_dump(mode="json")
    del tree["prune"]["pattern"]
    assert parse_config(tree) == parse_config({"name": "a"})
    assert parse_config(tree).prune.pattern == "weights"


def test_a_pattern_is_its_row_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows of a matrix, by their sums: added as one is, a function and a row."""

    def rows(scores: torch.Tensor, alive: torch.Tensor, keep: int) -> torch.Tensor:
        best = scores.sum(1).topk(keep // scores.shape[1]).indices
        return torch.zeros_like(alive).index_fill(0, best, True) & alive

    monkeypatch.setitem(PATTERNS, "rows", Pattern(rows, lambda *given: given[0], lambda shape: shape[1]))
    settings = Prune.model_validate({"pattern": "rows"})
    axes.require_fitting(settings, Target())
    assert patterns.of(settings).mask(SCORES, torch.ones_like(ALIVE), 2).tolist() == [[True, True], [False, False]]
    assert patterns.of(settings).granularity(SCORES.shape) == 2
