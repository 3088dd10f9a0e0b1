"""What a campaign tries next, worked by hand; that it always falls and ends; how a round is judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import TINY, merged

from pipeline.base.errors import UserError
from pipeline.base.stats import tango
from pipeline.rounds import campaign
from pipeline.rounds.campaign import Origin, Tried
from pipeline.settings.config import Config, flatten, parse_config
from pipeline.settings.pruning import Target


def no_loss(**target: Any) -> Config:
    return parse_config(merged({**TINY, "target": {"mode": "no-loss", **target}}, {}))


def carry_out(config: Config, origin: Origin, verdicts: Sequence[bool], floor: int = 1) -> list[tuple[int, int, int]]:
    """(round, attempt, weights to keep) of each attempt, where the verdicts fall in this order and then all are no."""
    tried: list[Tried] = []
    made = []
    while (goal := campaign.following(config.prune, config.target, origin, floor, tried)) is not None:
        made.append((goal.round, goal.attempt, goal.budget))
        accepted = verdicts[len(tried)] if len(tried) < len(verdicts) else False
        tried.append(Tried(goal.density, goal.budget, accepted))
        assert len(tried) < 1000
    return made


def test_a_campaign_by_hand() -> None:
    """Of 10,000 weights by halves: 5,000 and 2,500 do, 1,250 does not; half the step keeps 0.707 of the 2,500."""
    made = carry_out(no_loss(), Origin(10_000, 10_000), [True, True, False, True, False])
    assert made == [
        (1, 1, 5000),
        (2, 1, 2500),
        (3, 1, 1250),  # undone
        (3, 2, 1767),  # 2,500 x 0.7071
        (4, 1, 1249),  # 1,767 x 0.7071: the smaller step stays; undone
        (4, 2, 1485),  # 1,767 x 0.8409, undone
        (4, 3, 1620),  # 1,767 x 0.9170, undone; 0.9576 would keep more than 0.95
    ]


def test_a_campaign_ends_at_its_compression_its_rounds_or_the_fewest_weights() -> None:
    yes = [True] * 1000
    assert carry_out(no_loss(compression=3), Origin(1000, 1000), yes) == [(1, 1, 500), (2, 1, 333)]
    assert [made[2] for made in carry_out(no_loss(max_rounds=3), Origin(1000, 1000), yes)] == [500, 250, 125]
    assert [made[2] for made in carry_out(no_loss(), Origin(1000, 1000), yes, floor=200)] == [500, 250, 200]
    assert carry_out(no_loss(), Origin(3, 1000), yes) == [(1, 1, 1)]
    assert carry_out(no_loss(), Origin(200, 1000), yes, floor=200) == []


def test_a_campaign_of_which_nothing_is_accepted_ends_after_the_half_steps() -> None:
    assert [keep for _, _, keep in carry_out(no_loss(), Origin(1000, 1000), [])] == [500, 707, 840, 917]


@given(
    st.lists(st.booleans(), max_size=60),
    st.integers(1, 10**6),
    st.floats(0.01, 0.95),
    st.floats(0.0, 0.049),
    st.floats(1.0, 1e4) | st.none(),
)
@settings(max_examples=150, deadline=None)
def test_densities_fall_and_a_campaign_ends(
    verdicts: list[bool], total: int, step: float, more: float, compression: float | None
) -> None:
    config = no_loss(step=step, smallest_step=0.95 + more, compression=compression)
    origin, tried, stands = Origin(total, total), [], total
    while (goal := campaign.following(config.prune, config.target, origin, 1, tried)) is not None:
        assert 1 <= goal.budget < stands
        assert goal.round == goal.generation == 1 + sum(each.accepted for each in tried)
        refused = [each for each in tried[len(tried) - goal.attempt + 1 :] if not each.accepted]
        assert all(goal.density > each.planned_density for each in refused)  # each try of a round is a milder one
        accepted = verdicts[len(tried)] if len(tried) < len(verdicts) else len(tried) % 2 == 0
        tried.append(Tried(goal.density, goal.budget, accepted))
        stands = goal.budget if accepted else stands
        assert len(tried) <= config.target.max_rounds + 100
    assert sum(each.accepted for each in tried) <= config.target.max_rounds


def test_rounds_that_are_fixed_beforehand_come_one_after_the_other() -> None:
    config = parse_config(merged(TINY, {"target.compression": 4}))
    goals = campaign.outlook(config.prune, config.target, Origin(1000, 1000), 1)
    assert [(goal.round, goal.attempt, goal.budget, goal.generation) for goal in goals] == [
        (1, 1, 500, 1),
        (2, 1, 250, 2),
    ]


@pytest.mark.parametrize(
    ("schedule", "kept"), [("geometric", [200, 100]), ("cubic", [138, 100]), ("one-shot", [100]), ("list", [300, 90])]
)
def test_a_branchs_schedule_falls_from_where_it_begins(schedule: str, kept: list[int]) -> None:
    """From 400 of 1,000 weights after 3 rounds to 100: by sqrt(1/4) each; cubic has 7/8 of the 300 gone halfway."""
    wanted = {"target.compression": 10, "prune.schedule": schedule, "prune.list": [0.3, 0.09]}
    config = parse_config(merged(TINY, wanted))
    goals = campaign.outlook(config.prune, config.target, Origin(400, 1000, 3), 1)
    assert [goal.budget for goal in goals] == pytest.approx(kept, abs=1)
    assert [goal.generation for goal in goals] == [4, 5][: len(kept)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target.compression": 2}, "target.compression=2 removes nothing"),
        ({"prune.schedule": "list", "prune.list": [0.5, 0.1]}, r"prune.list=\[0.5, 0.1\] removes nothing"),
        ({"target.mode": "no-loss", "target.compression": 2}, "target.compression=2 removes nothing"),
    ],
)
def test_a_branch_that_would_remove_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    config = parse_config(merged(TINY, {"start.from": "other:3", **changes}))
    with pytest.raises(UserError, match=rf"{words}.*other:3 has 400 of 1,000 .*compression 2.5"):
        campaign.require_room(config.prune, config.target, Origin(400, 1000, 3), 1, config.start.source)


def answers(lost: int, won: int, samples: int) -> tuple[Any, Any]:
    dense, pruned = np.ones(samples, dtype=np.bool_), np.ones(samples, dtype=np.bool_)
    pruned[:lost] = False
    dense[lost : lost + won] = False
    return dense, pruned


def test_a_round_is_judged_by_what_it_may_have_lost() -> None:
    """3 of 1,000 lost and none won: measured 0.3 points, but up to 0.74 with 95% confidence."""
    as_measured = Target.model_validate({"confidence": 0.5, "tolerance": 0.003})
    found = campaign.judge(*answers(3, 0, 1000), as_measured)
    assert campaign.accepts(found, as_measured)
    assert (found.drop, found.drop_high) == (0.003, 0.003)
    assert not campaign.accepts(campaign.judge(*answers(4, 0, 1000), as_measured), as_measured)
    sure = Target.model_validate({"tolerance": 0.003})
    found = campaign.judge(*answers(3, 0, 1000), sure)
    assert not campaign.accepts(found, sure)
    assert found.drop_high == pytest.approx(tango(3, 0, 1000, 1.6448536)[1])
    assert found.drop_high == pytest.approx(0.0074, abs=1e-4)
    assert campaign.accepts(campaign.judge(*answers(3, 9, 1000), sure), sure)
    assert (found.only_dense_right, found.only_pruned_right, found.samples) == (3, 0, 1000)


def test_a_drop_that_is_certain_but_within_the_tolerance_is_accepted() -> None:
    target = Target.model_validate({})  # by default the margin, 0.3 points
    assert campaign.accepts(campaign.judge(*answers(60, 0, 50_000), target), target)
    assert tango(60, 0, 50_000)[0] > 0


def test_too_few_images_to_accept_anything_are_refused_with_what_would_help() -> None:
    with pytest.raises(UserError, match=r"144 val images .*1.8 points .*confidence=0.95.*0.3 of target.tolerance"):
        campaign.require_enough(144, Target.model_validate({}))
    with pytest.warns(UserWarning, match=r"val has 144 images.* answers 3 of them better and 3 worse .*3.3 points"):
        campaign.require_enough(144, Target.model_validate({"tolerance": 0.02}))
    campaign.require_enough(144, Target.model_validate({"tolerance": 0.0, "confidence": 0.5}))
    campaign.require_enough(6000, Target.model_validate({}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target.compression": None}, "compression=null: mode=compression needs a number"),
        ({"target.step": 0.97}, "step=0.97 keeps more than smallest_step=0.95"),
        ({"target.confidence": 0.4}, "target.confidence=0.4"),
        ({"start.from": "lenet"}, "from=lenet is not RUN:ROUND"),
        ({"start.from": "lenet:-1"}, "from=lenet:-1 is not RUN:ROUND"),
        ({"start.fom": "lenet:1"}, "did you mean 'start.from'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_config(merged(TINY, changes))


def test_the_last_colon_parts_run_and_round_and_a_config_is_written_as_it_is_read() -> None:
    config = parse_config(merged(TINY, {"start.from": "s3://bucket/runs/lenet:12"}))
    assert (config.start.run, config.start.round) == ("s3://bucket/runs/lenet", 12)
    assert flatten(config)["start.from"] == "s3://bucket/runs/lenet:12"
    assert parse_config(config.model_dump(mode="json")) == config
    assert no_loss().target.compression is None
    assert parse_config(no_loss().model_dump(mode="json")) == no_loss()
