"""The plan of a round of four weights, by hand: what goes, at which score, and what the scan says of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scan_records import level, row, scan, tensor
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.prune import damage, round_plan
from pipeline.prune.round_plan import Basis, Goal, Scanned, Standing
from pipeline.settings.pruning import Prune, Target

WEIGHTS = {"a": torch.tensor([[0.4, -0.1]]), "b": torch.tensor([[0.3, 0.2]])}
EVERYTHING = {name: torch.ones(1, 2, dtype=torch.bool) for name in WEIGHTS}
FIRST = {"a": torch.tensor([[True, False]]), "b": torch.tensor([[True, False]])}  # what is left of pooled's first round


def prune_of(**values: Any) -> Prune:
    return Prune.model_validate({"allocation": "pooled", "rounds": 2, "min_weights": 0, **values})


def target_of(**values: Any) -> Target:
    return Target.model_validate({"compression": 4, **values})


def basis(prune: Prune, target: Target, scanned: Scanned | None = None) -> Basis:
    return Basis(prune, target, 0, WEIGHTS, scanned)


def goal(number: int, prune: Prune, target: Target) -> Goal:
    """The goal of a run's round, as a run without undone rounds has it."""
    density = round_plan.densities(prune, target)[number - 1]
    return Goal(number, 1, density, round_plan.budget(prune, target, number, 4), number)


# Each tensor's loss rises by so much where half of it is left.
RISES = {"a": 0.1, "b": 0.2}
QUALITIES = {"a": 1.2, "b": 5.0}


def scanned(unit: Any = "weights", **values: Any) -> Scanned:
    tensors = [tensor(n, 2, [level(0.5, rise=RISES[n])], quality=QUALITIES[n]) for n in WEIGHTS]
    return round_plan.scanned(unit, scan(tensors, **values), 10, {"a": 8, "b": 40})


def test_the_densities_of_two_rounds_to_a_quarter() -> None:
    """By the same factor in each round, so the first keeps a half: 2 of 4 weights, and then 1."""
    prune, target = prune_of(), target_of()
    assert round_plan.densities(prune, target) == pytest.approx([0.5, 0.25])
    assert [round_plan.budget(prune, target, number, 4) for number in (1, 2)] == [2, 1]
    assert round_plan.densities(prune, target, start=0.64) == pytest.approx([0.4, 0.25])
    assert round_plan.budget(prune, target, 1, 100, start=0.64) == 40


def test_a_list_ends_at_its_own_last_density_and_not_at_the_compression() -> None:
    prune, target = prune_of(schedule="list", list=[0.75, 0.5]), target_of()
    assert round_plan.densities(prune, target) == [0.75, 0.5]
    assert [round_plan.budget(prune, target, number, 4) for number in (1, 2)] == [3, 2]


def test_a_compression_that_floats_miss_is_reached() -> None:
    """1 / (1/49) is a little below 49 as floats: the last budget follows from the compression itself."""
    prune, target = prune_of(schedule="one-shot"), target_of(compression=49)
    assert round_plan.budget(prune, target, 1, 49) == 1


def test_two_rounds_by_hand() -> None:
    """Of 0.4, 0.1, 0.3, 0.2 the first round keeps 0.4 and 0.3, and the second 0.4 alone."""
    prune, target = prune_of(), target_of()
    first = round_plan.make(basis(prune, target), goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert (first.round, first.attempt, first.budget, first.dead) == (1, 1, 2, 0)
    assert first.planned_density == pytest.approx(0.5)
    assert first.keep == {"a": 1, "b": 1}
    assert [(row.name, row.weights, row.dead) for row in first.tensors] == [("a", 2, 0), ("b", 2, 0)]
    assert [row.threshold for row in first.tensors] == pytest.approx([0.4, 0.3])
    second = round_plan.make(basis(prune, target), goal(2, prune, target), Standing(WEIGHTS, FIRST))
    assert second.keep == {"a": 1, "b": 0}
    a, b = (row.threshold for row in second.tensors)
    assert a == pytest.approx(0.4)
    assert b > float(WEIGHTS["b"][0, 0])  # just above what was left, which goes
    assert b == pytest.approx(0.3)


def test_what_is_gone_stays_gone_whatever_it_weighs() -> None:
    """The 0.1 and 0.2 that went would come back if scores alone counted: here they are the largest now."""
    grown = {"a": torch.tensor([[0.4, -9.0]]), "b": torch.tensor([[0.3, 9.0]])}
    prune, target = prune_of(), target_of()
    made = round_plan.make(basis(prune, target), goal(2, prune, target), Standing(grown, FIRST))
    assert made.keep == {"a": 1, "b": 0}


def test_the_plan_without_dead_units() -> None:
    prune, target = prune_of(), target_of()
    made = round_plan.make(basis(prune, target), goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    left = made.without_dead({"a": 1, "b": 0})
    assert left.keep == {"a": 1, "b": 0}
    assert [row.dead for row in left.tensors] == [0, 1]
    assert (left.budget, left.dead) == (1, 1)
    assert [row.threshold for row in left.tensors] == [row.threshold for row in made.tensors]
    assert (left.round, left.planned_density) == (made.round, made.planned_density)


def test_thresholds_of_which_each_round_has_its_share() -> None:
    """Deviations are 0.25 and 0.05, so the thresholds are 1.2 x 0.25 = 0.3 and 5 x 0.05 = 0.25; the first of two
    rounds has half of each. 0.15 takes the 0.1 alone; 0.3 and 0.25 leave 0.4 and 0.3."""
    prune, target = prune_of(min_weights=1), target_of(mode="thresholds")
    rests = basis(prune, target, scanned())
    assert round_plan.sigmas(rests, Standing(WEIGHTS, EVERYTHING)) == pytest.approx({"a": 0.25, "b": 0.05})
    first = round_plan.make(rests, goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert first.keep == {"a": 1, "b": 2}
    assert first.budget == 3  # the budget of 2 is not used
    assert first.planned_density == 0.75
    second = round_plan.make(rests, goal(2, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert second.keep == {"a": 1, "b": 1}


def test_deviations_of_the_dense_network_or_of_what_is_left() -> None:
    standing = Standing(
        {"a": torch.tensor([[1.0, 9.0]]), "b": torch.tensor([[2.0, 0.0]])}, EVERYTHING | {"a": FIRST["a"]}
    )
    renewed = round_plan.sigmas(basis(prune_of(sigma="renewed"), target_of()), standing)
    assert renewed == {"a": 0.0, "b": 1.0}  # of 1 alone; of 2 and 0
    assert round_plan.sigmas(basis(prune_of(), target_of()), standing) == pytest.approx({"a": 0.25, "b": 0.05})


def test_densities_given_by_name_fall_with_the_whole() -> None:
    """The end is a quarter; at a half, which is halfway there in the logarithm, 0.25 stands at 0.5 and 1 at 1."""
    prune, target = prune_of(allocation="explicit", densities={"a": 0.25, "b": 1.0}), target_of()
    assert round_plan.explicit_densities(prune, target, 0.5) == pytest.approx({"a": 0.5, "b": 1.0})
    made = round_plan.make(basis(prune, target), goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert made.keep == {"a": 1, "b": 2}
    dense = prune_of(allocation="explicit", densities={"a": 0.25}, schedule="list", list=[1.0])
    assert round_plan.explicit_densities(dense, target, 1.0) == {"a": 0.25}


def test_no_prediction_without_a_scan() -> None:
    prune, target = prune_of(), target_of()
    made = round_plan.make(basis(prune, target), goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert made.predicted is None


def spread(kept: float) -> float:
    """What a curve adds so that a budget is spread where no damage was seen."""
    return damage.SPREAD * math.expm1(-math.log(kept))


def test_what_a_scan_predicts_by_hand() -> None:
    """Rises of 0.1 and 0.2, of one weight of two each, add up as powers of 0.85: 0.1413 + 0.2546 = 0.3959, of which
    the 1/0.85th power is 0.336."""
    prune, target = prune_of(allocation="paper"), target_of()
    assert RISES["a"] ** 0.85 + RISES["b"] ** 0.85 == pytest.approx(0.3959, abs=1e-4)
    made = round_plan.make(basis(prune, target, scanned()), goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert made.keep == {"a": 1, "b": 1}  # |w| / (q sigma): 1.33, 0.33, 1.2, 0.8
    found = made.predicted
    assert found is not None
    total = sum(rise**0.85 + spread(0.5) for rise in RISES.values())
    assert found.rise == pytest.approx(total ** (1 / 0.85), rel=1e-3)
    assert found.rise == pytest.approx(0.336, abs=1e-3)
    assert (found.unit, found.budget, found.spent, found.power, found.scale) == ("weights", 2, 2, 0.85, 1.0)
    assert 0 < found.least <= found.rise


def test_a_budget_of_flops_counts_what_a_weight_costs() -> None:
    """A weight of `a` costs 4 FLOPs and one of `b` 20, and saves little more: both of `a` are bought first. 28 FLOPs
    then pay for one of `b`, and of 24 there are 16 left over."""
    prune, target = prune_of(allocation="budget"), target_of(compression=2, budget="flops")
    taken = scanned("flops")
    assert {name: [price(0), price(1), price(2)] for name, price in taken.prices.items()} == {
        "a": [0, 4, 8],
        "b": [0, 20, 40],
    }
    for budget, keep, spent in ((28, {"a": 2, "b": 1}, 28), (24, {"a": 2, "b": 0}, 8)):
        wanted = Goal(1, 1, 0.5, budget, 1)
        made = round_plan.make(basis(prune, target, taken), wanted, Standing(WEIGHTS, EVERYTHING))
        assert made.keep == keep
        assert made.predicted is not None
        assert (made.predicted.unit, made.predicted.budget, made.predicted.spent) == ("flops", budget, spent)


def test_what_was_measured_together_scales_what_is_predicted() -> None:
    """With powers of 1 the rises add up to 0.3; all pruned together the loss rose by 0.6, so it is twice as much."""
    together = (row(0.5, 1.0, 0.6, keep={"a": 1, "b": 1}),)
    prune, target = prune_of(allocation="budget"), target_of()
    rests = basis(prune, target, scanned(together=together))
    made = round_plan.make(rests, goal(1, prune, target), Standing(WEIGHTS, EVERYTHING))
    assert made.keep == {"a": 1, "b": 1}
    assert made.predicted is not None
    assert (made.predicted.power, made.predicted.scale) == (1.0, pytest.approx(2.0, rel=1e-3))
    assert made.predicted.rise == pytest.approx(0.6, rel=1e-3)


def test_what_follows_from_the_scan_and_from_trained_weights() -> None:
    table = [
        (name, mode) for name in ("uniform", "pooled", "paper", "budget") for mode in ("compression", "thresholds")
    ]
    asked = {
        (name, mode): (
            round_plan.needs_scan(prune_of(allocation=name), target_of(mode=mode)),
            round_plan.uses_scores(prune_of(allocation=name), target_of(mode=mode)),
        )
        for name, mode in table
    }
    assert {key[0]: value for key, value in asked.items() if key[1] == "compression"} == {
        "uniform": (False, False), "pooled": (False, True), "paper": (True, True), "budget": (True, False),
    }  # fmt: skip
    assert {value for key, value in asked.items() if key[1] == "thresholds"} == {(True, True)}


def test_a_goal_on_the_way_keeps_more() -> None:
    """To 2 of 8 weights at a quarter; on the way at a half it is 4, and never fewer than in the end."""
    last = Goal(3, 2, 0.25, 2, 5)
    assert last.at(0.5) == Goal(3, 2, 0.5, 4, 5)
    assert last.at(0.25) == last


def test_ceilings_leave_less_to_spend_before_the_last_round() -> None:
    """`b` may keep 1 of its 2: with the 2 of `a` that is 3, where the first of two rounds would keep 3.46."""
    target = target_of(compression=4 / 3)
    prune = prune_of(ceilings={"b": 0.5}, dead_neurons=False)
    rests, caps = basis(prune, target), round_plan.bounds(prune, EVERYTHING)[1]
    assert caps == {"a": 2, "b": 1}
    before, last = Goal(1, 1, 0.9, 4, 1), Goal(2, 1, round_plan.densities(prune, target)[-1], 4, 2)
    assert round_plan.spendable(rests, before, EVERYTHING, caps) == 3
    assert round_plan.spendable(rests, last, EVERYTHING, caps) == 4  # the last one is refused instead
    with pytest.raises(UserError, match=r"the budget of 4 weights .* is above the 3 that .* prune\.ceilings"):
        round_plan.make(rests, last, Standing(WEIGHTS, EVERYTHING))
    with_dead = basis(prune_of(ceilings={"b": 0.5}, dead_neurons=True), target)
    assert round_plan.spendable(with_dead, last, EVERYTHING, caps) == 3


SIZES = {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("prune", "target", "words"),
    [
        ({"min_weights": 1}, {}, r"the budget of 1 weights .* is below the 2 that prune\.min_weights=1"),
        ({"floors": {"a": 1.0}}, {}, r"the budget of 1 weights .* is below the 2 that .*prune\.floors"),
        ({"ceilings": {"*": 0.5}}, {"compression": 1}, r"the budget of 4 weights .* is above the 2"),
        ({}, {"compression": 5}, "target.compression=5 keeps less than one of the network's 4"),
    ],
)
def test_a_last_round_that_cannot_be_is_refused_beforehand(
    prune: dict[str, Any], target: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        round_plan.require_possible(prune_of(**prune), target_of(**target), SIZES, SIZES, SIZES)


def test_a_campaign_and_densities_by_name_are_not_asked_beforehand() -> None:
    floors: dict[str, Any] = {"floors": {"a": 1.0}}
    round_plan.require_possible(prune_of(**floors), target_of(mode="no-loss", compression=None), SIZES, SIZES, SIZES)
    named = prune_of(allocation="explicit", densities={"a": 1.0}, **floors)
    round_plan.require_possible(named, target_of(), SIZES, SIZES, SIZES)


def test_equal_inputs_give_equal_plans() -> None:
    prune, target = prune_of(criterion="random"), target_of()

    def made(alive: dict[str, Tensor]) -> round_plan.RoundPlan:
        return round_plan.make(basis(prune, target), goal(1, prune, target), Standing(WEIGHTS, alive))

    assert made(EVERYTHING) == made({name: mask.clone() for name, mask in EVERYTHING.items()})
