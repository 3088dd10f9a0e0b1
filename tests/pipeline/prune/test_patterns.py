"""Patterns, worked by hand on four numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_two_of_four_keeps_the_best_two_of_each_group_before_any_other() -> None:
    pattern = patterns.of(Prune.model_validate({"pattern": "2:4"}))
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0, 0.0, 5.0, 5.0, 5.0]])
    alive = torch.ones_like(scores, dtype=torch.bool)
    assert pattern.most(alive) == 8
    half = [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1, 0]]  # of equal ones the first
    assert pattern.mask(scores, alive, 8).int().tolist() == half
    assert pattern.mask(scores, alive, 9).int().tolist() == [[1, 1, 1, 0, 0, 0, 1, 1], half[1]]
    assert pattern.mask(scores, alive, 5).int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1, 0]]


def test_inputs_of_a_convolution_are_its_channels_and_a_short_group_counts_too() -> None:
    pattern = patterns.of(Prune.model_validate({"pattern": "1:2"}))
    scores = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).repeat(2, 1, 1, 2)
    alive = torch.ones_like(scores, dtype=torch.bool)
    assert pattern.most(alive) == 2 * 2 * 2
    mask = pattern.mask(scores, alive, 8)
    assert mask[:, :, 0, 0].int().tolist() == [[0, 1, 1]] * 2
    assert pattern.most(mask) == 8
    alone = torch.ones(4, 1, 3, 3, dtype=torch.bool)  # depthwise: one input each, of which none can go for a pattern
    assert pattern.most(alone) == 36
    assert patterns.most(Prune.model_validate({"pattern": "1:2"}), {"a": (2, 3, 1, 2), "b": (4, 1, 3, 3)}) == {
        "a": 8, "b": 36,
    }  # fmt: skip


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 2)),
    st.sampled_from(["2:4", "4:8", "1:4", "1:2", "3:5"]),
    st.data(),
)
def test_n_of_m_holds_exact_counts_and_nests(shape: tuple[int, int, int], name: str, data: st.DataObject) -> None:
    pattern, (n, m) = patterns.of(Prune.model_validate({"pattern": name})), map(int, name.split(":"))
    size = shape[0] * shape[1] * shape[2]
    scores = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))).float().view(shape)
    alive = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)
    count = int(alive.sum())
    keeps = sorted(data.draw(st.sets(st.integers(1, max(1, count)), max_size=5)), reverse=True) if count else []
    found = pattern.nested(scores, alive, keeps)
    most = pattern.most(alive)
    assert most <= count
    for number, keep in enumerate(keeps):
        mask = pattern.mask(scores, alive, keep)
        assert torch.equal(found > number, mask)
        assert int(mask.sum()) == keep
        assert not (mask & ~alive).any()
        if keep <= most:
            assert all(part.sum(1).max() <= n for part in mask.split(m, dim=1))
    assert int(pattern.mask(scores, alive, most).sum()) == most


@pytest.mark.parametrize("name", ["0:4", "4:4", "5:4"])
def test_numbers_that_are_no_pattern_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"prune.pattern={name}: keeps at most n of m"):
        axes.require_fitting(Prune.model_validate({"pattern": name}), Target())


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

    monkeypatch.setitem(
        PATTERNS, "rows", Pattern(rows, lambda *given: given[0], lambda shape: shape[1], lambda alive: alive.numel())
    )
    settings = Prune.model_validate({"pattern": "rows"})
    axes.require_fitting(settings, Target())
    assert patterns.of(settings).mask(SCORES, torch.ones_like(ALIVE), 2).tolist() == [[True, True], [False, False]]
    assert patterns.of(settings).granularity(SCORES.shape) == 2
