"""Every setting does something, and one that does nothing beside the others is told of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from tiny_run import merged

from pipeline.cli import commands
from pipeline.rounds.idle import ROWS, idle
from pipeline.settings.config import Config, flatten, load_config, parse_config


def config_of(**changes: Any) -> Config:
    return parse_config(merged({"name": "x"}, changes))


# A value of each setting that is not its default, and does nothing beside the other defaults.
IDLE: dict[str, Any] = {
    "exchange_precision": "bf16",
    "data.root": "/somewhere", "data.class_index": "index.json", "data.follow_links": True, "data.quality": 80,
    "data.decoder": "pillow", "data.shift": 3, "data.cache_disk_bytes": 10**9,
    "data.decoded_cache_bytes": 10**9, "model.checkpoint_key": "ema",
    "dense.milestones": [0.3], "dense.gamma": 0.2, "dense.power": 0.5,
    "retrain.milestones": [0.3], "retrain.gamma": 0.2, "retrain.power": 0.5, "retrain.temperature": 2.0,
    "scan.tolerance": 0.1, "scan.max_levels": 5, "scan.hopeless": 0.7, "scan.together": [0.5],
    "prune.statistics_samples": 50, "prune.densities": {"a": 0.5}, "prune.list": [0.5], "prune.gradual_every": 7,
    "prune.shrink_between_rounds": True,
    "target.latency_ms": 3.0, "target.latency_table": "t.json", "target.latency_device": "a phone",
    "target.latency_batch": 8,
    "target.step": 0.7, "target.smallest_step": 0.9, "target.tolerance": 0.01, "target.confidence": 0.9,
    "target.max_rounds": 3, "export.codebook_epochs": 7, "cluster.resize_seconds": 5.0, "cluster.lease_seconds": 5.0,
}  # fmt: skip
# Those that count beside the defaults, with what makes them idle.
BESIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    "reproducible": (False, {"device": "cpu"}),
    "data.val_fraction": (0.3, {"data.source": "shards", "data.root": "/x"}),
    "data.shard_samples": (10, {"data.source": "shards", "data.root": "/x"}),
    "data.build_workers": (2, {"data.source": "shards", "data.root": "/x"}),
    "data.shrink": (100, {"data.source": "shards", "data.root": "/x"}),
    "data.test_fraction": (0.3, {"data.source": "idx", "data.root": "/x"}),
    "dense.nesterov": (True, {"dense.optimizer": "adamw"}),
    "retrain.nesterov": (True, {"retrain.optimizer": "adamw"}),
    "prune.rounds": (7, {"prune.schedule": "one-shot"}),
    "prune.sigma": ("renewed", {"prune.allocation": "uniform"}),
    "target.compression": (3.0, {"target.budget": "latency", "target.latency_ms": 3.0}),
    "tracking.uri": ("http://x", {"tracking.enabled": False}),
    "tracking.experiment": ("mine", {"tracking.enabled": False}),
    "tracking.register": ("small", {"tracking.models": "none"}),
    "tracking.models": ("final", {"tracking.enabled": False}),
    "tracking.system_metrics": (False, {"tracking.enabled": False}),
}


def test_each_setting_that_can_be_idle_has_an_example_here() -> None:
    assert {row.setting for row in ROWS} == IDLE.keys() | BESIDE.keys()


@pytest.mark.parametrize("setting", IDLE)
def test_a_setting_that_needs_another_is_told_of(setting: str) -> None:
    [said] = idle(config_of(**{setting: IDLE[setting]}))
    assert re.match(rf"{re.escape(setting)}=.* is ignored: it needs ", said)


@pytest.mark.parametrize("setting", BESIDE)
def test_a_setting_that_another_switches_off_is_told_of(setting: str) -> None:
    value, others = BESIDE[setting]
    assert [*idle(config_of(**{setting: value}))] == []
    said = [*idle(config_of(**{setting: value, **others}))]
    assert len(said) == 1
    assert said[0].startswith(f"{setting}=")


@pytest.mark.parametrize("ends", [{"prune.schedule": "list", "prune.list": [0.5, 0.25]}, {"target.mode": "thresholds"}])
def test_a_compression_that_something_else_stands_for_is_told_of(ends: dict[str, Any]) -> None:
    [said] = idle(config_of(**{"target.compression": 20.0, **ends}))
    assert said.startswith("target.compression=20")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_momentum_is_read_by_both_optimizers(optimizer: str) -> None:
    assert [*idle(config_of(**{"dense.optimizer": optimizer, "dense.momentum": 0.5}))] == []


def test_nothing_is_idle_by_default_or_in_the_configs_that_come_with_it() -> None:
    assert [*idle(config_of())] == []
    for file in sorted((ROOT / "configs").glob("*.yaml")):
        assert [*idle(load_config(file))] == [], file.name


def test_a_command_tells_of_it_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: x\nprune: {gradual_every: 7}\n")
    with pytest.warns(UserWarning, match="is ignored") as told:
        commands.read(file, None)
    assert [str(each.message) for each in told] == ["prune.gradual_every=7 is ignored: it needs prune.gradual"]


def test_every_setting_is_read_outside_of_the_settings() -> None:
    files = [*Path(ROOT, "pipeline").rglob("*.py"), *Path(ROOT, "cluster").rglob("*.py")]
    code = "\n".join(file.read_text() for file in files)
    unread = [setting for setting in flatten(config_of()) if not re.search(rf"\.{setting.rpartition('.')[2]}\b", code)]
    assert unread == []
