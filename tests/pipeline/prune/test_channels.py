"""Whole channels: scores and counts by hand on a chain of three layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.base.errors import UserError
from pipeline.network import cost
from pipeline.network.groups import Groups, find
from pipeline.prune import channels, round_plan
from pipeline.settings.pruning import Prune

FLOPS = {"0.weight": 6000, "2.weight": 8, "4.weight": 20}
SIZES = {"0.weight": 6, "2.weight": 8, "4.weight": 20}


@pytest.fixture(scope="module")
def chain() -> Groups:
    """Layers of 3 to 2, 2 to 4 and 4 to 5: groups of two and of four channels, 34 weights."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5))
    return find(model, torch.zeros(2, 3), {"0.weight": (2, 3), "2.weight": (4, 2), "4.weight": (5, 4)})


def prune(**given: object) -> Prune:
    return Prune.model_validate({"pattern": "channels", "allocation": "uniform", **given})


RANKING = {
    "0.weight": torch.tensor([[1.0, 1, 1], [3, 3, 3]]),  # rows 1 and 3, of a mean of 2
    "2.weight": torch.tensor([[1.0, 3], [1, 3], [2, 4], [4, 6]]),  # columns 2 and 4; rows 2, 2, 3, 5; mean 3
    "4.weight": torch.tensor([[4.0, 1, 2, 1]] * 5),  # columns 4, 1, 2, 1, of a mean of 2
}


def test_a_channel_scores_the_mean_of_its_weights_each_tensor_by_its_own_mean(chain: Groups) -> None:
    found = channels.scores(chain, RANKING)
    assert found["0.weight"].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, (3 / 2 + 4 / 3) / 2])
    assert found["2.weight"].tolist() == pytest.approx(
        [(2 / 3 + 4 / 2) / 2, (2 / 3 + 1 / 2) / 2, (3 / 3 + 2 / 2) / 2, (5 / 3 + 1 / 2) / 2]
    )


def planned(chain: Groups, settings: Prune, budget: int, unit: cost.Quantity = "weights", **given: object) -> list[int]:
    units = channels.scores(chain, RANKING)
    price = channels.by_tensor(chain, round_plan.costs(unit, SIZES, FLOPS))
    found = channels.plan(settings, chain, units, chain.whole, budget, price, given.get("densities"))  # type: ignore[arg-type]
    return [found["0.weight"], found["2.weight"]]


@pytest.mark.parametrize(
    ("budget", "keep"),
    # Two to six channels, shared out as 2 to 4: 9 weights for 1 and 1, 15 for 1 and 2, 21 for 1 and 3, 27 for 2 and 3.
    [(9, [1, 1]), (14, [1, 1]), (15, [1, 2]), (20, [1, 2]), (21, [1, 3]), (27, [2, 3]), (33, [2, 3]), (34, [2, 4])],
)
def test_uniform_takes_the_most_channels_that_the_budget_pays_for(chain: Groups, budget: int, keep: list[int]) -> None:
    assert planned(chain, prune(), budget) == keep


def test_a_budget_of_flops_counts_flops(chain: Groups) -> None:
    assert planned(chain, prune(), 3020, "flops") == [1, 3]  # half of the first layer: 3000 FLOPs; 3 and 15 more
    assert planned(chain, prune(), 6021, "flops") == [2, 3]


def test_pooled_takes_the_highest_scores_of_all_groups(chain: Groups) -> None:
    # From above: 1.42 (unit 1 of the first), 1.33, 1.08, 1.0 (units 0, 3, 2 of the second), 0.58 twice.
    assert planned(chain, prune(allocation="pooled"), 21) == [1, 3]
    masks = channels.masks(chain, channels.scores(chain, RANKING), chain.whole, {"0.weight": 1, "2.weight": 3})
    assert masks["0.weight"].int().tolist() == [[0, 0, 0], [1, 1, 1]]
    assert masks["2.weight"].int().tolist() == [[0, 1], [0, 0], [0, 1], [0, 1]]
    assert masks["4.weight"].int().tolist() == [[1, 0, 1, 1]] * 5


def test_explicit_densities_are_shares_of_channels(chain: Groups) -> None:
    settings = prune(allocation="explicit", densities={"2.weight": 0.5})
    assert planned(chain, settings, 0, densities={"2.weight": 0.5}) == [2, 2]


def test_floors_and_ceilings_bound_channels(chain: Groups) -> None:
    assert planned(chain, prune(floors={"0.weight": 1.0}), 17) == [2, 1]  # 6 + 2 + 5; with 2 it would be 20
    assert planned(chain, prune(ceilings={"2.*": 0.5}), 34) == [2, 2]


def test_channels_that_went_stay_gone(chain: Groups) -> None:
    alive = {"0.weight": np.array([True, False]), "2.weight": np.array([True, True, True, False])}
    units = channels.scores(chain, RANKING)
    keep = channels.plan(prune(allocation="pooled"), chain, units, alive, 15, channels.by_tensor(chain, {}))
    assert keep == {"0.weight": 1, "2.weight": 2}
    masks = channels.masks(chain, units, alive, keep)
    assert chain.alive(masks)["0.weight"].tolist() == [True, False]
    assert chain.alive(masks)["2.weight"].tolist() == [True, False, True, False]


def test_too_small_a_budget_is_refused(chain: Groups) -> None:
    with pytest.raises(UserError, match=r"the fewest channels cost 9, more than the budget of 8 "):
        planned(chain, prune(), 8)
    with pytest.raises(UserError, match=r"the fewest channels cost 20, "):
        planned(chain, prune(min_weights=2), 19)


def test_a_network_without_channels_to_remove_is_refused() -> None:
    alone = find(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3), {"0.weight": (2, 3)})
    with pytest.raises(UserError, match="no channel of this network can be removed: all are inputs or outputs"):
        channels.require_possible(alone, {}, 3, lambda keep: 0, "channels")


@given(st.integers(9, 33), st.sampled_from(["uniform", "pooled"]))
def test_a_larger_budget_never_keeps_fewer_channels(budget: int, allocation: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 5))
    groups = find(model, torch.zeros(2, 3), {"0.weight": (2, 3), "2.weight": (4, 2), "4.weight": (5, 4)})
    settings = prune(allocation=allocation)
    less, more = planned(groups, settings, budget), planned(groups, settings, budget + 1)
    assert all(one <= other for one, other in zip(less, more, strict=True))
    for each, paid in ((less, budget), (more, budget + 1)):
        assert sum(groups.counts(dict(zip(groups.by_name, each, strict=True))).values()) <= paid
