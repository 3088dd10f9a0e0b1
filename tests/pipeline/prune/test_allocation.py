import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requested import allocate, request
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.prune import allocation, axes
from pipeline.prune.allocation import ALLOCATIONS, Allocation, proportional, threshold, threshold_counts
from pipeline.prune.budget import USUAL, Composed, Priced
from pipeline.prune.damage import Curve
from pipeline.prune.limits import bounds
from pipeline.prune.masks import top_mask
from pipeline.settings.pruning import Prune, Target


def all_alive(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


FOUR = {"a": torch.tensor([4.0, 3.0]), "b": torch.tensor([2.0, 1.0])}


def test_pooled_takes_the_highest_of_all() -> None:
    assert allocate("pooled", FOUR, all_alive(FOUR), 2, min_weights=0) == {"a": 2, "b": 0}


def test_pooled_leaves_each_tensor_its_minimum() -> None:
    assert allocate("pooled", FOUR, all_alive(FOUR), 2, min_weights=1) == {"a": 1, "b": 1}


def test_paper_divides_by_quality_and_sigma() -> None:
    # a: 4/8, 3/8 = 0.5, 0.375; b: 2/(2*0.5), 1/(2*0.5) = 2, 1
    sigmas, qualities = {"a": 4.0, "b": 0.5}, {"a": 2.0, "b": 2.0}
    found = allocate("paper", FOUR, all_alive(FOUR), 3, sigmas=sigmas, qualities=qualities, min_weights=0)
    assert found == {"a": 1, "b": 2}


def test_paper_without_qualities_uses_sigma_alone() -> None:
    found = allocate("paper", FOUR, all_alive(FOUR), 2, sigmas={"a": 4.0, "b": 0.5}, min_weights=0)
    assert found == {"a": 0, "b": 2}


def test_paper_keeps_a_constant_tensor_but_not_its_zeros() -> None:
    scores = {"a": torch.tensor([9.0, 8.0]), "flat": torch.full((2,), 0.1), "zero": torch.zeros(2)}
    sigmas = {"a": 1.0, "flat": 0.0, "zero": 0.0}
    assert allocate("paper", scores, all_alive(scores), 3, sigmas=sigmas, min_weights=0) == {
        "a": 1,
        "flat": 2,
        "zero": 0,
    }


def test_ties_go_to_the_tensor_defined_first() -> None:
    scores = {"z": torch.ones(3), "a": torch.ones(3)}
    assert allocate("pooled", scores, all_alive(scores), 4, min_weights=0) == {"z": 3, "a": 1}


def test_only_the_living_compete() -> None:
    alive = {"a": torch.tensor([False, True]), "b": torch.tensor([True, True])}
    assert allocate("pooled", FOUR, alive, 2, min_weights=0) == {"a": 1, "b": 1}


def test_uniform_rounds_by_the_largest_remainder() -> None:
    scores = {"a": torch.rand(5), "b": torch.rand(3), "c": torch.rand(2)}
    # density 0.4: 2.0, 1.2, 0.8
    assert allocate("uniform", scores, all_alive(scores), 4) == {"a": 2, "b": 1, "c": 1}


def test_uniform_gives_on_what_a_tensor_cannot_take() -> None:
    scores = {"a": torch.rand(10), "b": torch.rand(10)}
    alive = {"a": torch.arange(10) < 2, "b": torch.ones(10, dtype=torch.bool)}
    assert allocate("uniform", scores, alive, 8) == {"a": 2, "b": 6}


def test_erk_by_hand() -> None:
    # sum(shape): 10x10 -> 20, 2x2 -> 4. Budget 12 -> 10 and 2; budget 48 would give 40 and 8, but b has only 4.
    scores = {"a": torch.rand(10, 10), "b": torch.rand(2, 2)}
    assert allocate("erk", scores, all_alive(scores), 12) == {"a": 10, "b": 2}
    assert allocate("erk", scores, all_alive(scores), 48) == {"a": 44, "b": 4}


def test_erk_counts_kernel_dimensions() -> None:
    # 2+2+3+3 = 10 against 5+5 = 10: equal counts
    scores = {"conv": torch.rand(2, 2, 3, 3), "fc": torch.rand(5, 5)}
    assert allocate("erk", scores, all_alive(scores), 20) == {"conv": 10, "fc": 10}


def test_explicit_name_before_pattern_and_the_rest_dense() -> None:
    scores = {"fc1": torch.rand(10), "fc2": torch.rand(10), "conv": torch.rand(7)}
    found = allocate("explicit", scores, all_alive(scores), 0, densities={"fc*": 0.5, "fc2": 0.25})
    assert found == {"fc1": 5, "fc2": 3, "conv": 7}


def test_explicit_keeps_to_the_bounds() -> None:
    scores = {"a": torch.rand(10), "b": torch.rand(10)}
    alive = {"a": torch.arange(10) < 2, "b": torch.ones(10, dtype=torch.bool)}
    found = allocate("explicit", scores, alive, 0, densities={"a": 0.5, "b": 0.01}, min_weights=3)
    assert found == {"a": 2, "b": 3}


def test_explicit_pattern_that_matches_nothing() -> None:
    scores = {"fc1.weight": torch.rand(10)}
    with pytest.raises(UserError, match=r"prune.densities: 'fc2.weight' .*did you mean 'fc1.weight'"):
        allocate("explicit", scores, all_alive(scores), 0, densities={"fc2.weight": 0.5})


def test_floors_and_ceilings_are_densities_by_name_or_pattern() -> None:
    sizes = {"fc1": 10, "fc2": 10, "conv": 7}
    found = bounds(sizes, sizes | {"fc2": 3}, 2, {"fc*": 0.5}, {"fc1": 0.5, "conv": 0.2})
    # fc1 is fixed; fc2 has only 3 left; conv's min_weights goes before its ceiling of 1
    assert found == ({"fc1": 5, "fc2": 3, "conv": 2}, {"fc1": 5, "fc2": 3, "conv": 2})
    scores = {name: torch.rand(size) for name, size in sizes.items()}
    kept = allocate("uniform", scores, all_alive(scores), 14, floors={"fc1": 0.9}, ceilings={"conv": 0.3})
    assert kept == {"fc1": 9, "fc2": 3, "conv": 2}


def test_limits_that_cannot_be_are_named() -> None:
    for setting in ("floors", "ceilings"):
        with pytest.raises(UserError, match=rf"prune.{setting}: 'c' matches no prunable tensor; known: a, b"):
            allocate("pooled", FOUR, all_alive(FOUR), 2, **{setting: {"c": 0.5}})
    with pytest.raises(UserError, match=r"prune.floors gives a at least 0.6 .*prune.ceilings at most 0.5"):
        allocate("pooled", FOUR, all_alive(FOUR), 2, floors={"a": 0.6}, ceilings={"*": 0.5})
    with pytest.raises(UserError, match=r"budget of 2 .*below the 3 .*prune.floors"):
        allocate("pooled", FOUR, all_alive(FOUR), 2, floors={"a": 1.0})
    with pytest.raises(UserError, match=r"budget of 4 .*above the 3 .*prune.ceilings"):
        allocate("pooled", FOUR, all_alive(FOUR), 4, ceilings={"a": 0.5})


def test_impossible_budgets_name_the_setting() -> None:
    with pytest.raises(UserError, match=r"budget of 1 .*target.compression.*prune.min_weights=1"):
        allocate("uniform", FOUR, all_alive(FOUR), 1)
    with pytest.raises(UserError, match=r"budget of 5 .*above the 4"):
        allocate("pooled", FOUR, all_alive(FOUR), 5)


def test_an_allocation_is_its_row_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that gives everything to the first tensor, added as one is: a function, a row."""
    greedy = Allocation(lambda r: {n: r.budget if n == min(r.scores) else 0 for n in r.scores}, uses_scores=True)
    monkeypatch.setitem(ALLOCATIONS, "greedy", greedy)
    settings = Prune.model_validate({"allocation": "greedy"})
    assert allocation.of(settings) is greedy
    axes.require_fitting(settings, Target())
    assert allocate("greedy", FOUR, all_alive(FOUR), 2, min_weights=0) == {"a": 2, "b": 0}


def test_what_others_ask_of_each_allocation() -> None:
    def those(trait: str) -> list[str]:
        return [name for name, row in ALLOCATIONS.items() if getattr(row, trait)]

    assert those("uses_scores") == ["paper", "pooled"]
    assert those("needs_scan") == ["paper", "budget"]
    assert those("needs_together") == those("spends_costs") == ["budget"]
    assert those("fixes_densities") == ["explicit"]


def test_unknown_allocation_and_nan() -> None:
    with pytest.raises(UserError, match=r"prune.allocation='papr'.*did you mean 'paper'"):
        allocate("papr", FOUR, all_alive(FOUR), 2)
    bad = FOUR | {"b": torch.tensor([1.0, torch.nan])}
    with pytest.raises(UserError, match="b: its scores are not numbers"):
        allocate("pooled", bad, all_alive(bad), 2)


def test_tensors_of_different_precision_compare_exactly() -> None:
    close = 1.0 + 1e-12  # equal to 1 in float32
    scores = {"a": torch.tensor([1.0]), "b": torch.tensor([close], dtype=torch.float64)}
    assert allocate("pooled", scores, all_alive(scores), 1, min_weights=0) == {"a": 0, "b": 1}


small_tensors = st.dictionaries(
    st.sampled_from("dcba"),
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.5, 2.0]), st.booleans()), min_size=1, max_size=12),
    min_size=1,
)


DENSITIES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@given(small_tensors, st.sampled_from(sorted(ALLOCATIONS)), st.integers(0, 3), st.data())
def test_every_allocation_keeps_to_budget_and_bounds(
    tensors: dict[str, list[tuple[float, bool]]], name: str, min_weights: int, data: st.DataObject
) -> None:
    scores = {key: torch.tensor([score for score, _ in pairs]) for key, pairs in tensors.items()}
    alive = {key: torch.tensor([living for _, living in pairs]) for key, pairs in tensors.items()}
    limits = {key: sorted(data.draw(st.tuples(DENSITIES, DENSITIES))) for key in scores}
    least, most = {key: low for key, (low, _) in limits.items()}, {key: high for key, (_, high) in limits.items()}
    sizes, living = {key: len(pairs) for key, pairs in tensors.items()}, {k: int(m.sum()) for k, m in alive.items()}
    floors, caps = bounds(sizes, living, min_weights, least, most)
    budget = data.draw(st.integers(sum(floors.values()), sum(caps.values())))
    sigmas = {key: data.draw(st.sampled_from([0.0, 0.5, 3.0])) for key in scores}
    priced = {key: Priced(Curve(np.array([0, n]), np.array([1.0, 0.0])), int) for key, n in sizes.items()}
    damages = Composed({USUAL.power: priced}, {1.0: USUAL})
    found = allocate(
        name, scores, alive, budget,
        sigmas=sigmas, densities={"*": 0.5}, damages=damages, min_weights=min_weights, floors=least, ceilings=most,
    )  # fmt: skip
    assert list(found) == list(scores)
    assert all(floors[key] <= found[key] <= caps[key] for key in scores)
    if not ALLOCATIONS[name].fixes_densities:
        assert sum(found.values()) == budget


@given(small_tensors, st.integers(0, 2), st.data())
def test_pooled_against_a_plain_sort(
    tensors: dict[str, list[tuple[float, bool]]], min_weights: int, data: st.DataObject
) -> None:
    scores = {key: torch.tensor([score for score, _ in pairs]) for key, pairs in tensors.items()}
    alive = {key: torch.tensor([living for _, living in pairs]) for key, pairs in tensors.items()}
    ranked = {
        key: sorted((-score, index) for index, (score, living) in enumerate(pairs) if living)
        for key, pairs in tensors.items()
    }
    sizes, living = {key: len(pairs) for key, pairs in tensors.items()}, {k: len(r) for k, r in ranked.items()}
    ceilings = {key: data.draw(st.sampled_from([0.1, 0.5, 1.0])) for key in scores}
    forced, caps = bounds(sizes, living, min_weights, {}, ceilings)
    budget = data.draw(st.integers(sum(forced.values()), sum(caps.values())))
    rest = sorted(
        (score, place, index)
        for place, key in enumerate(scores)
        for score, index in ranked[key][forced[key] : caps[key]]
    )
    wanted = dict(forced)
    for _, place, _ in rest[: budget - sum(forced.values())]:
        wanted[list(scores)[place]] += 1
    assert allocate("pooled", scores, alive, budget, min_weights=min_weights, ceilings=ceilings) == wanted


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=8), st.data()
)
def test_proportional_lies_within_one_of_the_real_solution(
    rows: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    shares = {str(i): share for i, (share, _, _) in enumerate(rows)}
    floors = {str(i): floor for i, (_, floor, _) in enumerate(rows)}
    caps = {str(i): floor + more for i, (_, floor, more) in enumerate(rows)}
    budget = data.draw(st.integers(sum(floors.values()), sum(caps.values())))
    found = proportional(shares, floors, caps, budget)
    assert sum(found.values()) == budget
    assert all(floors[name] <= count <= caps[name] for name, count in found.items())
    low, high = 0.0, 1e3
    for _ in range(80):  # the level of the real solution, found another way
        level = (low + high) / 2
        total = sum(min(max(level * shares[n], floors[n]), caps[n]) for n in shares)
        low, high = (level, high) if total <= budget else (low, level)
    for name, count in found.items():
        assert abs(count - min(max(low * shares[name], floors[name]), caps[name])) < 1 + 1e-6


def test_thresholds_as_they_are() -> None:
    scores = {"a": torch.tensor([0.9, 1.0, 1.1]), "b": torch.tensor([0.1, 0.2, 5.0])}
    alive = all_alive(scores) | {"b": torch.tensor([True, True, False])}
    sigmas, qualities = {"a": 2.0, "b": 1.0}, {"a": 0.5, "b": 3.0}
    units = {"sigmas": sigmas, "qualities": qualities}
    assert threshold_counts(request(scores, alive, min_weights=0, **units)) == {"a": 2, "b": 0}
    assert threshold_counts(request(scores, alive, min_weights=1, **units)) == {"a": 2, "b": 1}


def test_paper_at_the_thresholds_own_size_finds_the_thresholds() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.randn(400).abs(), "b": torch.randn(300).abs() * 5}
    sigmas, qualities = {"a": 1.0, "b": 5.0}, {"a": 1.5, "b": 0.7}
    wanted = threshold_counts(request(scores, all_alive(scores), sigmas=sigmas, qualities=qualities))
    found = allocate("paper", scores, all_alive(scores), sum(wanted.values()), sigmas=sigmas, qualities=qualities)
    assert found == wanted


def test_threshold_is_the_smallest_kept_score() -> None:
    scores, alive = torch.tensor([5.0, 1.0, 3.0, 9.0]), torch.tensor([True, True, True, False])
    assert [threshold(scores, keep, alive) for keep in (1, 2, 3)] == [5.0, 3.0, 1.0]
    nothing = threshold(scores, 0, alive)
    assert nothing > 5.0
    assert math.isclose(nothing, 5.0, rel_tol=1e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_threshold_agrees_with_the_mask(values: list[int], data: st.DataObject) -> None:
    scores = torch.tensor([float(value) for value in values])
    alive = torch.ones(len(values), dtype=torch.bool)
    keep = data.draw(st.integers(1, len(values)))
    mask = top_mask(scores, alive, keep)
    assert threshold(scores, keep, alive) == float(scores[mask].min())
