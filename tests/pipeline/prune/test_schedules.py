import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.prune.schedules import SCHEDULES, budgets, densities
from pipeline.settings.pruning import Prune


def prune(**settings: object) -> Prune:
    return Prune.model_validate(settings)


def test_one_shot() -> None:
    assert densities(prune(schedule="one-shot"), 0.25) == [0.25]


def test_geometric_halves_each_round() -> None:
    assert densities(prune(schedule="geometric", rounds=3), 0.125) == pytest.approx([0.5, 0.25, 0.125])


def test_cubic_by_hand() -> None:
    # sparsity 0.8 * (1 - (1 - k/2)^3): k=1 gives 0.8 * 7/8 = 0.7
    assert densities(prune(schedule="cubic", rounds=2), 0.2) == pytest.approx([0.3, 0.2])


def test_list_ends_at_its_own_last() -> None:
    assert densities(prune(schedule="list", list=[0.5, 0.1]), 0.08) == [0.5, 0.1]


@given(st.sampled_from(["one-shot", "geometric", "cubic"]), st.integers(1, 12), st.floats(1e-4, 1.0))
def test_densities_fall_to_exactly_the_final_one(schedule: str, rounds: int, final: float) -> None:
    found = densities(prune(schedule=schedule, rounds=rounds), final)
    assert found[-1] == final
    assert len(found) == (1 if schedule == "one-shot" else rounds)
    assert all(final - 1e-12 <= density <= 1.0 for density in found)
    assert found == sorted(found, reverse=True) or final > 0.999


def test_what_others_ask_of_each_schedule() -> None:
    assert [name for name, row in SCHEDULES.items() if row.from_list] == ["list"]
    assert [name for name, row in SCHEDULES.items() if not row.fixes_densities] == ["geometric"]


def test_an_unknown_schedule_suggests() -> None:
    with pytest.raises(UserError, match=r"prune.schedule='oneshot' is unknown; did you mean 'one-shot'"):
        densities(prune(schedule="oneshot"), 0.5)


def test_budgets_by_hand() -> None:
    # LeNet-300-100: 266,200 / 12 = 22,183.3
    assert budgets([0.5, 1 / 12], 266_200, 12.0) == [133_100, 22_183]


def test_budget_is_not_one_short_where_floats_round() -> None:
    assert budgets([0.1], 10, None) == [1]
    assert budgets([1 / 1.1], 11, 1.1) == [10]
    assert budgets([0.29], 100, None) == [29]  # int(0.29 * 100) is 28


@given(st.integers(1, 10**9), st.floats(1.0, 500.0), st.integers(1, 8))
def test_compression_is_reached_and_one_weight_more_would_miss_it(total: int, compression: float, rounds: int) -> None:
    if total < compression:
        with pytest.raises(UserError, match=r"target.compression"):
            budgets([1 / compression], total, compression)
        return
    found = budgets(densities(prune(rounds=rounds), 1 / compression), total, compression)
    assert total / found[-1] >= compression
    assert found[-1] == total or total / (found[-1] + 1) < compression
    assert found == sorted(found, reverse=True)
    assert found[0] <= total


def test_less_than_one_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"prune.list=0.001 .*100"):
        budgets([0.001], 100, None)
