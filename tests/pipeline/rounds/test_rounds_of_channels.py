"""Whole runs with prune.pattern=channels: whole channels go in every round, and the network that is left is small."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ALONE, carry_out

from pipeline import stages
from pipeline.base.errors import UserError
from pipeline.local import LocalEngine
from pipeline.network.build import build_network
from pipeline.network.compact import compact
from pipeline.network.groups import Groups
from pipeline.network.survey import survey
from pipeline.prune import channels
from pipeline.prune.channels import groups_of as groups_of_network
from pipeline.results import budgets
from pipeline.rounds import outlook
from pipeline.run.events import unheard
from pipeline.run.layout import round_folder
from pipeline.run.records import RoundPlan, Scan
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config
from pipeline.train import checkpoint
from pipeline.train.session import open_session

SMALL: dict[str, Any] = {
    "tracking.enabled": False, "prune.pattern": "channels", "prune.allocation": "uniform", "prune.rounds": 2,
    "target.compression": 4,
}  # fmt: skip
GROUPS = ["fc1.weight", "fc2.weight"]


def groups_of(config: Config) -> Groups:
    model = build_network(config.model, 10, 0)
    groups = groups_of_network(model, survey(model)[0], torch.zeros(2, 1, 8, 8), config.prune)
    assert groups is not None
    return groups


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"prune.allocation": "pooled", "target.budget": "flops"},
        {"prune.allocation": "pooled", "prune.criterion": "taylor", "prune.gradual": 0.5},
        {"prune.criterion": "obs", "prune.reconstruct_samples": 100},
        {"prune.allocation": "explicit", "prune.densities": {"fc1.weight": 0.2, "fc2.weight": 0.5}},
    ],
)
def test_whole_channels_go_in_every_round(tiny: Callable[..., Config], more: dict[str, Any]) -> None:
    config = tiny(**SMALL | more)
    result = carry_out(config)
    run, groups = Run(run_root(config), 0), groups_of(config)
    before = groups.whole
    for number in (1, 2):
        plan = run.load(RoundPlan, round_folder(number), "plan.json")
        saved = checkpoint.load(run, f"{round_folder(number)}/checkpoint")
        alive = groups.alive(saved.masks)
        assert [group.name for group in plan.groups] == GROUPS
        assert {group.name: group.keep for group in plan.groups} == {name: int(f.sum()) for name, f in alive.items()}
        assert all((flags <= before[name]).all() for name, flags in alive.items())  # none comes back
        for name, mask in groups.masks(alive).items():  # a weight stays where both of its channels do, nowhere else
            assert torch.equal(saved.masks[name], mask)
            assert not saved.weights[name][~mask].any()
        before = alive
    if "prune.densities" in more:
        assert [int(flags.sum()) for flags in before.values()] == [60, 50]
    elif "target.budget" not in more:
        assert 4.0 <= result["compression"] < 4.3  # a channel of the first layer has 164 of 50,200 weights
    model = build_network(config.model, 10, 0)
    model.load_state_dict(saved.weights)
    small = compact(model.eval(), torch.zeros(1, 1, 8, 8)).model
    left = sum(parameter.numel() for name, parameter in small.named_parameters() if name.endswith("weight"))
    assert left == result["weights_kept"]


def test_a_campaign_prunes_channels_as_far_as_nothing_is_lost(tiny: Callable[..., Config]) -> None:
    campaign = {
        "target.mode": "no-loss", "target.compression": None, "target.confidence": 0.5, "target.tolerance": 0.3,
        "target.max_rounds": 2, "prune.dense_control": False,
    }  # fmt: skip
    config = tiny(**SMALL | campaign)
    result = carry_out(config)
    accepted = [each["density"] for each in result["rounds"] if each["accepted"]]
    assert accepted
    assert accepted[0] == pytest.approx(0.5, abs=0.02)


def test_two_channels_of_a_group_are_the_least(tiny: Callable[..., Config]) -> None:
    config = tiny(**SMALL | {"prune.min_weights": 2, "target.compression": 1000})
    with pytest.raises(UserError, match=r"the fewest channels cost 152, more than the budget of 50 "):
        carry_out(config)  # 2·64 + 2·2 + 2·10
    assert not Path(run_root(config), "dense").exists()


def test_a_branch_from_single_weights_is_refused(tiny: Callable[..., Config]) -> None:
    carry_out(tiny(**SMALL | {"prune.pattern": "weights", "prune.rounds": 1, "prune.dense_control": False}))
    branch = tiny(**SMALL | {"name": "branch", "start.from": "tiny:1", "target.compression": 8})
    with pytest.raises(UserError, match=r"single weights of fc1.weight are pruned already.*start.from name round 0"):
        carry_out(branch)
    whole = tiny(**SMALL | {"name": "whole", "start.from": "tiny:0", "prune.rounds": 1})
    assert carry_out(whole)["compression"] >= 4


def test_the_plan_lists_groups_and_channels(tiny: Callable[..., Config]) -> None:
    made = outlook.make(tiny(**SMALL))
    assert made.groups is not None
    assert list(made.groups.by_name) == GROUPS
    assert made.rounds[-1].kept == sum(made.groups.counts(made.kept_units).values()) <= 50_200 // 4
    assert made.kept_units == {"fc1.weight": 118, "fc2.weight": 39}  # of 300 and 100: 39% of each


def test_the_scan_measures_each_group_alone_and_its_budget_is_met(tiny: Callable[..., Config]) -> None:
    given = {"prune.allocation": "budget", "target.budget": "flops", "scan.together": [0.8, 0.5], "prune.rounds": 1}
    config = tiny(**SMALL | given)
    result = carry_out(config)
    run, groups = Run(run_root(config), 0), groups_of(config)
    found = run.load(Scan, "scan", "scan.json")
    assert [(each.name, each.kind, each.weights) for each in found.tensors] == [
        ("fc1.weight", "channels", 300),
        ("fc2.weight", "channels", 100),
    ]
    assert [[level.kept for level in each.levels] for each in found.tensors] == [[150, 30], [50, 10]]
    assert found.together is not None
    assert {sum(row.keep.values()) for row in found.together} == {320, 200}  # of 400 channels
    plan = run.load(RoundPlan, round_folder(1), "plan.json")
    kept = {group.name: group.keep for group in plan.groups}
    assert plan.predicted is not None
    assert plan.predicted.unit == "flops"
    assert plan.predicted.spent == 2 * sum(groups.counts(kept).values()) <= plan.predicted.budget == 2 * 50_200 // 4
    for name in kept:  # no further channel would fit
        more = kept | {name: kept[name] + 1}
        assert 2 * sum(groups.counts(more).values()) > plan.predicted.budget
    assert result["compression"] >= 4
    options = budgets.solve(config, [4.0])
    assert options.asked[0].solution.keep == kept
    assert options.total / options.asked[0].kept == pytest.approx(result["compression"])
    timed = config.model_copy(update={"target": config.target.model_copy(update={"budget": "latency"})})
    with pytest.raises(UserError, match="how long this network takes is not known yet"):
        budgets.solve(timed, [4.0])


def test_a_group_alone_is_pruned_as_its_channels_score(tiny: Callable[..., Config]) -> None:
    """The levels of fc2's group, against the network with the same channels masked by hand."""
    config = tiny(**SMALL | {"scan.levels": [0.5], "dense.epochs": 1})
    with open_run(config) as here:
        found = stages.scan(config, LocalEngine(ALONE), here, unheard)
        session = open_session(config, ALONE, here, unheard)
        model, groups = session.new_model().eval(), groups_of(config)
        model.load_state_dict(checkpoint.load(here, "dense/checkpoint").weights)
        weights = {name: model.get_parameter(name).detach() for name in groups.shapes}
        units = channels.scores(groups, {name: weight.abs() for name, weight in weights.items()})
        masks = channels.masks(groups, units, groups.whole, {"fc1.weight": 300, "fc2.weight": 50})
        for name, mask in masks.items():
            weights[name].mul_(mask)
        answers = session.evaluate(model, "val").metrics()
    [level] = found.tensors[1].levels
    assert level.top1 == answers.top1
    assert level.loss == pytest.approx(answers.loss, rel=1e-6)


def test_an_older_plan_has_no_groups() -> None:
    plan = RoundPlan(round=1, planned_density=0.5, budget=2, tensors=())
    document = json.loads(json.dumps(plan.to_json()))
    del document["groups"]
    assert RoundPlan.from_json(document, "plan.json") == dataclasses.replace(plan, groups=())
