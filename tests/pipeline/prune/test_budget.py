"""The solved allocation: two tensors by hand, and against every possible allocation of small ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from requested import allocate
from scan_records import level as level_with
from scan_records import row, scan, tensor

from pipeline.network import cost
from pipeline.prune import damage
from pipeline.prune.budget import USUAL, Composed, Held, Priced, predicted, solve
from pipeline.prune.damage import Curve
from pipeline.run.records import DenseFigures, Level


def table(*values: float) -> Curve:
    """The damage where 0, 1, 2, ... weights are kept."""
    return Curve(np.arange(len(values)), np.array(values, dtype=float))


def dear(each: int) -> Callable[[int], int]:
    return lambda kept: each * kept


A, B = table(8, 4, 2, 1, 0), table(6, 1, 0)
NONE, ALL = {"a": 0, "b": 0}, {"a": 4, "b": 2}


def weights(**curves: Curve) -> dict[str, Priced]:
    return {name: Priced(curve, dear(1)) for name, curve in curves.items()}


@pytest.mark.parametrize(
    ("budget", "keep", "left"),
    [
        (0, {"a": 0, "b": 0}, 14),
        (1, {"a": 0, "b": 1}, 9),  # b's first weight saves 5, a's saves 4
        (3, {"a": 2, "b": 1}, 3),
        (4, {"a": 3, "b": 1}, 2),  # three pieces save 1: the tensor named first keeps
        (6, {"a": 4, "b": 2}, 0),
    ],
)
def test_what_saves_most_is_kept_first(budget: int, keep: dict[str, int], left: float) -> None:
    found = solve(weights(a=A, b=B), NONE, ALL, budget)
    assert (found.keep, found.spent, found.damage) == (keep, budget, left)
    assert found.gap == pytest.approx(0)


def test_a_dear_weight_must_save_more() -> None:
    priced = {"a": Priced(A, dear(1)), "b": Priced(B, dear(3))}
    # saved a FLOP: a 4, 2, 1, 1; b 5/3, 1/3
    assert solve(priced, NONE, ALL, 5).keep == {"a": 2, "b": 1}
    short = solve(priced, NONE, ALL, 4)  # b's first weight costs 3, 2 are left
    assert (short.keep, short.spent, short.damage) == ({"a": 2, "b": 0}, 2, 8)
    assert short.bound == pytest.approx(8 - 5 * 2 / 3)  # below 5, the optimum: {"a": 1, "b": 1}


def test_floors_and_caps_hold() -> None:
    assert solve(weights(a=A, b=B), {"a": 0, "b": 2}, ALL, 3).keep == {"a": 1, "b": 2}
    assert solve(weights(a=A, b=B), NONE, {"a": 1, "b": 2}, 3).keep == {"a": 1, "b": 2}
    assert solve(weights(a=A, b=B), {"a": 3, "b": 0}, {"a": 3, "b": 2}, 4).keep == {"a": 3, "b": 1}  # a is fixed


def test_a_curve_that_is_flat_first_is_bought_whole_or_cut() -> None:
    flat = table(5, 5, 5, 0)  # nothing is saved before the third weight
    found = solve(weights(a=flat, b=B), NONE, {"a": 3, "b": 2}, 3)
    assert found.keep == {"a": 2, "b": 1}  # 5/3 a weight of a, 1 of b's second
    assert (found.damage, found.bound) == (6, pytest.approx(6 - 2 * 5 / 3))


def rest(values: list[int]) -> list[float]:
    """What each further weight saves, as the damage left."""
    return [float(sum(values[i:])) for i in range(len(values) + 1)]


def instances(most: int = 5) -> Any:
    """Up to three small tensors with any falling curve and rising cost, floors and caps, and two budgets."""
    saves = st.lists(st.integers(0, 9), min_size=1, max_size=most)
    one = saves.flatmap(
        lambda s: st.tuples(
            st.just(s),
            st.lists(st.integers(0, 4), min_size=len(s), max_size=len(s)),
            st.tuples(st.integers(0, len(s)), st.integers(0, len(s))).map(sorted),
        )
    )
    return st.tuples(st.lists(one, min_size=1, max_size=3), st.floats(0, 1), st.floats(0, 1))


@settings(deadline=None)
@given(instances())
def test_the_budget_the_limits_and_the_bound_hold_and_smaller_budgets_keep_less(given: Any) -> None:
    tensors, *shares = given
    priced, floors, caps = {}, {}, {}
    for i, (saves, prices, (low, high)) in enumerate(tensors):
        costs = [sum(prices[:k]) for k in range(len(prices) + 1)]
        priced[str(i)] = Priced(table(*rest(saves)), costs.__getitem__)
        floors[str(i)], caps[str(i)] = low, high

    def spent(keep: dict[str, int]) -> int:
        return sum(each.cost(keep[name]) for name, each in priced.items())

    least, most = spent(floors), spent(caps)
    found = [solve(priced, floors, caps, least + math.floor(share * (most - least))) for share in sorted(shares)]
    for solution, share in zip(found, sorted(shares), strict=True):
        money = least + math.floor(share * (most - least))
        assert all(floors[name] <= count <= caps[name] for name, count in solution.keep.items())
        assert solution.spent == spent(solution.keep) <= money
        ranges = [range(floors[name], caps[name] + 1) for name in priced]
        possible = (dict(zip(priced, counts, strict=True)) for counts in itertools.product(*ranges))
        best = min(predicted(priced, keep) for keep in possible if spent(keep) <= money)
        assert solution.bound <= best + 1e-9
        assert best <= solution.damage + 1e-9
        assert solution.gap >= 0
    assert all(found[0].keep[name] <= found[1].keep[name] for name in priced)


@settings(deadline=None)
@given(instances(most=8))
def test_a_budget_of_weights_is_met_exactly_and_convex_curves_are_solved_to_the_optimum(given: Any) -> None:
    tensors, share, _ = given
    priced = weights(**{str(i): table(*rest(sorted(saves, reverse=True))) for i, (saves, _, _) in enumerate(tensors)})
    floors = {str(i): low for i, (_, _, (low, _)) in enumerate(tensors)}
    caps = {str(i): high for i, (_, _, (_, high)) in enumerate(tensors)}
    least, most = sum(floors.values()), sum(caps.values())
    money = least + math.floor(share * (most - least))
    found = solve(priced, floors, caps, money)
    assert sum(found.keep.values()) == found.spent == money
    assert found.gap == pytest.approx(0, abs=1e-9)


def level(density: float, rise: float, reach: float = 0.01) -> Level:
    return level_with(density, rise=rise, rise_low=rise - reach, rise_high=rise + reach)


def test_the_curve_goes_through_the_levels_and_grows_by_a_power_beyond_them() -> None:
    found = damage.curve([level(0.5, 0.1), level(0.1, 0.4)], 10_000, room=2.0)
    rises = {
        d: damage.total_rise(found.at(round(d * 10_000)), damage.USUAL_POWER) for d in (1.0, 0.7, 0.5, 0.2, 0.1, 0.05)
    }
    assert rises[1.0] == 0
    assert rises[0.5] == pytest.approx(0.1, abs=1e-3)
    assert rises[0.1] == pytest.approx(0.4, abs=1e-3)
    assert 0 < rises[0.7] < 0.1 < rises[0.2] < 0.4
    assert rises[0.05] == pytest.approx(0.8, rel=0.01)  # log 4 / log 5 = 0.86 is below FLATTEST: power 1


@pytest.mark.parametrize("power", [0.5, 0.85, 1.0])
def test_damages_add_up_to_more_than_their_rises(power: float) -> None:
    small = damage.curve([level(0.1, 0.1)], 1000, 2.0, power).at(100)
    assert damage.total_rise(small, power) == pytest.approx(0.1, abs=1e-3)
    assert damage.total_rise(small + small, power) == pytest.approx(0.1 * 2 ** (1 / power), abs=1e-3)


def test_rises_are_made_monotone_by_their_intervals() -> None:
    rises, _ = damage.measured([level(0.5, 0.1), level(0.2, 0.04), level(0.1, 0.3)])
    assert rises == pytest.approx([0.07, 0.07, 0.3])
    rises, _ = damage.measured([level(0.5, 0.1, 0.1), level(0.2, 0.04, 0.01)])  # weights 1 to 100
    assert rises == pytest.approx([4.1 / 101] * 2)
    assert damage.measured([level(0.5, -0.02)])[0] == pytest.approx([0])


LOST = [(0.05, math.inf), (0.01, math.nan)]


def test_a_loss_that_is_not_finite_is_only_beyond_trust() -> None:
    lost = [level_with(d, rise=rise, rise_low=math.nan, rise_high=math.nan) for d, rise in LOST]
    found = damage.curve([level(0.5, 0.1), level(0.1, 0.4), *lost], 1000, 2.0)
    assert found.at(50) == damage.curve([level(0.5, 0.1), level(0.1, 0.4)], 1000, 2.0).at(50)


def test_a_level_of_one_sample_has_no_interval_and_counts_little() -> None:
    alone = level_with(0.5, rise=0.3, rise_low=None, rise_high=None)
    rises, reach = damage.measured([alone, level(0.1, 0)])
    assert reach == pytest.approx([1, 0.01])
    assert rises == pytest.approx([0, 0], abs=1e-3)


SATURATED = [level(0.5, 0.5), level(0.2, 2.2), level(0.1, 2.25), level(0.01, 2.25)]


def test_a_saturated_curve_goes_on_growing_and_its_tensor_is_not_killed() -> None:
    dying = damage.curve(SATURATED, 1000, room=2.3)
    assert dying.at(10) > 100 * dying.at(500)
    sturdy = damage.curve([level(0.5, 0.0), level(0.1, 0.2), level(0.01, 1.0)], 1000, room=2.3)
    floors, caps = {"a": 1, "b": 1}, {"a": 1000, "b": 1000}
    assert solve(weights(a=dying, b=sturdy), floors, caps, 60).keep["a"] > 30
    measured = table(*np.interp(np.arange(1001), [0, 10, 100, 200, 500, 1000], [2.25, 2.25, 2.25, 2.2, 0.5, 0]))
    assert solve(weights(a=measured, b=sturdy), floors, caps, 60).keep["a"] == 1  # as far as the losses go


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.001, 0.99), st.floats(-1, 30), st.floats(0, 1)), max_size=8, unique_by=lambda x: x[0]
    ),
    st.integers(1, 10**7),
    st.floats(0.01, 10),
)
@example([(0.001, 0.0, 0.0), (0.0010000000000000002, 0.0, 0.0)], 1, 1.0)
def test_every_curve_falls_to_nothing_and_is_finite(levels: list[Any], size: int, room: float) -> None:
    found = damage.curve([level(*each) for each in levels], size, room)
    assert found.kept[0] == 0
    assert found.kept[-1] == size
    assert np.isfinite(found.damage).all()
    assert (np.diff(found.kept) > 0).all()
    assert (np.diff(found.damage) <= 0).all()
    assert found.damage[-1] == 0


def test_chance_is_told_by_the_number_of_classes() -> None:
    found = scan([tensor("a", 100, SATURATED)], dense=DenseFigures(0.9, 0.3))
    assert damage.chance_rise(found, 10) == pytest.approx(math.log(10) - 0.3)
    assert damage.curves(found, 10)["a"].weights == 100


@pytest.mark.parametrize("unit", ["weights", "flops", "bytes"])
def test_a_network_like_vgg_16_is_solved(unit: cost.Quantity) -> None:
    sizes = [1728, 36864, 73728, 147456, 294912, *[589824] * 3, 1179648, *[2359296] * 5, 102760448, 16777216, 4096000]
    priced = {}
    for i, size in enumerate(sizes):
        levels = [level(d, 0.01 * d ** -(1 + i / 10)) for d in np.geomspace(0.8, 0.01, 13)]
        priced[str(i)] = Priced(
            damage.curve(levels, size, 6.9), cost.price(unit, size, 2 * size * (1 + 1000 // (i + 1)))
        )
    floors, caps = dict.fromkeys(priced, 1), {str(i): size for i, size in enumerate(sizes)}
    budget = sum(each.cost(each.curve.weights) for each in priced.values()) // 10
    found = solve(priced, floors, caps, budget)
    assert budget - found.spent < (1 if unit == "weights" else 3000)
    assert found.gap < 1e-4 * found.rise


def test_the_allocation_spends_weights_within_what_is_alive_and_its_limits() -> None:
    scores = {"a": torch.rand(4), "b": torch.rand(2)}
    alive = {"a": torch.ones(4, dtype=torch.bool), "b": torch.tensor([True, False])}
    damages = Composed({USUAL.power: weights(a=A, b=B)}, {1.0: USUAL})
    keep = allocate("budget", scores, alive, 4, damages=damages, min_weights=0)
    assert keep == {"a": 3, "b": 1}
    keep = allocate("budget", scores, alive, 4, damages=damages, floors={"a": 1.0}, min_weights=0)
    assert keep == {"a": 4, "b": 0}


def test_a_budget_is_solved_by_what_holds_at_the_density_it_leads_to() -> None:
    first = weights(a=table(8, 4, 2, 1, 0), b=table(6, 1, 0))
    second = weights(a=table(1, 0, 0, 0, 0), b=table(6, 5, 0))  # as if other rises composed
    half, tenth = Held(1.0, 2.0), Held(0.5)
    damages = Composed({1.0: first, 0.5: second}, {0.5: half, 0.1: tenth})
    spend = damages.within(NONE, ALL)
    assert damages.at(0.9) == damages.at(0.3) == half  # 0.3 is 1.7 times below 0.5, and 3 times above 0.1
    assert damages.at(0.2) == tenth
    many, few = spend(3), spend(1)
    assert (many.keep, many.held) == ({"a": 2, "b": 1}, half)
    assert (many.damage, many.rise) == (3, 6)  # measured, it was twice what the damages make
    assert (few.keep, few.held) == ({"a": 0, "b": 1}, tenth)
    assert few.rise == pytest.approx(25)  # where 0.1 of the weights were kept, 0.6 of them, the least damage was 5


def test_the_power_that_lost_least_together_is_found_for_each_density() -> None:
    rows = [row(0.5, 0.3, 0.2), row(0.5, 0.85, 0.2), row(0.5, 1.0, 0.2), row(0.1, 0.3, 0.4), row(0.1, 1.0, math.nan)]
    best = damage.best_together(rows)
    assert {density: each.power for density, each in best.items()} == {0.5: 0.85, 0.1: 0.3}
    assert damage.best_together([]) == {}
