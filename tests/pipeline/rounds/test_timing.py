"""Whole runs with target.budget=latency, by tables whose times are made up and so are the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import carry_out, equal, final_weights

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.cli import commands
from pipeline.export import table
from pipeline.export.bench import bench_run
from pipeline.network.build import build_network
from pipeline.network.groups import Groups
from pipeline.network.survey import survey
from pipeline.prune import channels, latency
from pipeline.rounds import outlook, preflight, timing
from pipeline.run.layout import round_folder
from pipeline.run.records import LatencyTable, RoundPlan, Timed
from pipeline.run.state import Run, run_root
from pipeline.settings.config import Config
from pipeline.task.feed import Feed

BY_LATENCY: dict[str, Any] = {
    "tracking.enabled": False, "prune.pattern": "channels", "prune.allocation": "uniform", "prune.rounds": 2,
    "target.budget": "latency", "target.latency_ms": 2.0, "prune.dense_control": False, "retrain.epochs": 1,
    "dense.epochs": 1, "target.latency_device": "a phone",
}  # fmt: skip


def ms_of(kept: dict[str, int]) -> float:
    """10 ms and more for the whole network of 300 and 100 hidden units; 1 ms is for every network."""
    first, second = kept["fc1.weight"] / 300, kept["fc2.weight"] / 100
    return 1.0 + 6.0 * first + 3.0 * first * second + 0.5 * second


def write(config: Config, path: Path, **changes: Any) -> Config:
    """A table of the config's network on a phone, as a file that the config then takes."""
    groups = groups_of(config)
    timed = []
    for keep in table.widths(groups):
        first, second = keep["fc1.weight"] / 300, keep["fc2.weight"] / 100
        steps = {"fc1": 6.0 * first, "fc2": 3.0 * first * second, "fc3": 0.5 * second}
        timed.append(Timed(keep, ms_of(keep), steps))
    made = LatencyTable("a phone", 1, table.network(groups, Feed.of(config).shape), tuple(timed))
    path.write_text(json.dumps({**made.to_json(), **changes}))
    return config.model_copy(update={"target": config.target.model_copy(update={"latency_table": str(path)})})


def groups_of(config: Config) -> Groups:
    model = build_network(config.model, 10, 0)
    prunable, _ = survey(model)
    groups = channels.groups_of(model, prunable, torch.zeros(2, 1, 8, 8), config.prune)
    assert groups is not None
    return groups


def test_a_run_reaches_its_milliseconds_and_keeps_its_table(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = write(tiny(**BY_LATENCY), tmp_path / "table.json")
    carry_out(config)
    run = Run(run_root(config), 0)
    assert run.load(LatencyTable, timing.FILE).device == "a phone"
    times = []
    for number in (1, 2):
        plan = run.load(RoundPlan, round_folder(number), "plan.json")
        times.append(ms_of({group.name: group.keep for group in plan.groups}))
    assert times[0] == pytest.approx((10.5 * 2.0) ** 0.5, abs=0.05)  # halfway in the logarithm
    assert times[1] <= 2.0 < times[1] + 0.05
    predicted = bench_run(run.root, repeats=5, batches=(1,)).predicted
    assert predicted is not None
    assert predicted.dense_ms == pytest.approx(10.5)
    assert predicted.compact_ms == pytest.approx(times[1])
    assert predicted.error is None  # this machine is no phone
    weights = final_weights(config)
    (tmp_path / "table.json").unlink()  # the run's own copy is what counts from here on
    for part in ("rounds", "final"):
        storage.remove_tree(run.path(part))
    carry_out(config)
    assert equal(final_weights(config), weights)


def test_the_plan_needs_a_table_and_shows_what_it_comes_to(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(**BY_LATENCY)
    with pytest.raises(UserError, match="how long this network takes is not known yet: `secateur bench CONFIG --table"):
        outlook.make(config)
    made = outlook.make(write(config, tmp_path / "table.json"))
    assert ms_of(made.kept_units) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize(
    ("changes", "settings", "sentence"),
    [
        ({}, {"target.latency_device": "a tablet"}, "is of the device 'a phone', and target.latency_device=a tablet"),
        ({}, {"target.latency_device": None}, r"is of the device 'a phone', and this run's device is 'cpu \("),
        (
            {},
            {"target.latency_device": None, "cluster.gpus_per_worker": 1},
            r"is of the device 'a phone', and this run's device is 'cpu \(",
        ),
        ({"network": "other"}, {}, "is of another network"),
        ({}, {"data.size": 6, "data.resize": 6, "model.kwargs.inputs": 36}, "is of another network"),
        ({}, {"target.latency_batch": 4}, r"is of 1 samples a pass, and target.latency_batch=4"),
        ({"timed": []}, {}, "its times are not those of this network's steps"),
        ({}, {"target.latency_ms": 11.0}, r"target.latency_ms=11 removes nothing: .* takes 10.5 ms"),
        ({}, {"target.latency_ms": 0.9}, r"the fewest channels cost 1.0\d ms, more than the budget of 0.9 ms"),
    ],
)
def test_a_table_of_something_else_and_a_time_out_of_reach_are_refused(
    tiny: Callable[..., Config], tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    made = write(tiny(**BY_LATENCY), tmp_path / "table.json", **changes)
    given = BY_LATENCY | {"target.latency_table": made.target.latency_table} | settings
    with pytest.raises(UserError, match=sentence):
        carry_out(tiny(**given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can judge a GPU's table")
def test_a_driver_without_a_gpu_leaves_the_device_of_a_table_to_its_workers(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    given = BY_LATENCY | {"target.latency_device": None, "cluster.gpus_per_worker": 1}
    preflight.check(write(tiny(**given), tmp_path / "table.json"))
    with pytest.raises(UserError, match="is of the device 'a phone'"):
        preflight.check(write(tiny(**given | {"device": "cpu"}), tmp_path / "table.json"))


def test_what_is_no_table_is_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    for text in ("", "{}", "[1]"):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(UserError):
            outlook.make(tiny(**BY_LATENCY | {"target.latency_table": str(tmp_path / "t.json")}))
    with pytest.raises(UserError, match="cannot be read as a table of latencies"):
        outlook.make(tiny(**BY_LATENCY | {"target.latency_table": str(tmp_path / "nowhere.json")}))


def test_a_table_that_is_measured_here_can_be_planned_with(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.table.CENTRES", (0.5, 0.2))
    file = tmp_path / "table.json"
    said = commands.bench_table(str(tiny_yaml), [], str(file))
    assert said.startswith(f"{file}: on cpu (")
    made = LatencyTable.from_json(json.loads(file.read_text()), "table.json")
    half = made.timed[0].ms / 2
    settings = ["prune.pattern=channels", "prune.allocation=uniform", "target.budget=latency"]
    config = commands.load(tiny_yaml, [*settings, f"target.latency_table={file}", f"target.latency_ms={half}"])
    groups = groups_of(config)
    price = latency.price(groups, made)
    least = price(dict.fromkeys(groups.sizes, 1))
    if half * latency.NS > least:  # on most machines this network takes no time but that of its calls
        assert price(outlook.make(config).kept_units) <= half * latency.NS
    else:
        with pytest.raises(UserError, match="the fewest channels cost"):
            outlook.make(config)
