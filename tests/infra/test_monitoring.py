"""Alerts and dashboard: every gauge that they name is one that the code sets, and every gauge is shown and watched."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from infra_files import INFRA, manifests, pod_templates

from cluster.metrics import GAUGES, LAST_STEP, PREFIX, RANK, Gauges
from pipeline.run.events import Mirrored, Paced, Saved, Stepped, WorkersBegun

FOLDER = INFRA / "monitoring"
RULES = yaml.safe_load((FOLDER / "rules.yaml").read_text())["spec"]["groups"][0]["rules"]
BOARD = json.loads((FOLDER / "dashboard.json").read_text())
ALERTED = {rule["alert"]: rule["expr"] for rule in RULES}
SHOWN = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
NAMES = {PREFIX + name for name in GAUGES}


def named(text: str) -> set[str]:
    return set(re.findall(rf"{PREFIX}\w+", text))


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_file_names_a_gauge_that_is_not_set(path: Any) -> None:
    assert named(path.read_text()) - {f"{PREFIX}secateur_"} <= NAMES


def test_every_gauge_is_shown_and_watched() -> None:
    assert set.union(*map(named, SHOWN)) == NAMES
    assert set.union(*map(named, ALERTED.values())) == NAMES


@pytest.mark.parametrize("expression", [*ALERTED.values(), *SHOWN])
def test_an_expression_uses_labels_that_its_gauge_has(expression: str) -> None:
    assert expression.count("(") == expression.count(")")
    for labels in re.findall(r"by \((.*?)\)", expression):
        assert {label.strip() for label in labels.split(",")} <= set(RANK)


def test_prometheus_finds_the_port_and_may_reach_it() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())["spec"]
    objects = manifests()
    (endpoint,) = monitor["podMetricsEndpoints"]
    *nodes, submitter = pod_templates(objects["RayJob/secateur-"])
    wanted = monitor["selector"]["matchLabels"].items()
    for template in nodes:
        assert wanted <= template["metadata"]["labels"].items()
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        assert ports[endpoint["port"]] == 8080
    assert not wanted <= submitter["metadata"]["labels"].items()
    spec = objects["RayCluster/secateur"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["rayStartParams"]["metrics-export-port"] == "8080"
    (rule,) = objects["NetworkPolicy/secateur-metrics"]["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8080}]


def test_the_kustomization_holds_all() -> None:
    listed = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {*listed["resources"], *(file for made in listed["configMapGenerator"] for file in made["files"])}
    assert files | {"kustomization.yaml", "README.md"} == {path.name for path in FOLDER.iterdir()}


class Noted:
    """Stands where Ray's gauge would, and keeps what it is set to."""

    kept: dict[tuple[str, str | None], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.keys)
        self.kept[self.name, tags.get("rank")] = value


def test_events_set_the_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noted, "kept", {}, raising=False)
    monkeypatch.setattr("cluster.metrics.time.time", lambda: 1000.0)
    gauges = Gauges("runs/demo", Noted)
    for event in (
        WorkersBegun("dense", 1, 2),
        Stepped("dense", 5, 10),
        Paced("dense", 5, 0, 640.0, 0.25, 3, 1),
        Paced("dense", 5, 1, 639.0, 0.5, 4, 2),
        Saved("dense", 5, 1.5),
        WorkersBegun("dense", 2, 2),
        WorkersBegun("dense", 3, 2),
        WorkersBegun("rounds", 1, 2),
        Mirrored(12.0),
    ):
        gauges(event)
    assert Noted.kept == {
        (LAST_STEP, None): 1000.0,
        ("secateur_images_per_second", None): 640.0,
        ("secateur_data_wait_ratio", "0"): 0.25,
        ("secateur_data_wait_ratio", "1"): 0.5,
        ("secateur_bad_images", "0"): 3,
        ("secateur_bad_images", "1"): 4,
        ("secateur_storage_retries", "0"): 1,
        ("secateur_storage_retries", "1"): 2,
        ("secateur_checkpoint_seconds", None): 1.5,
        ("secateur_restarts", None): 2,
        ("secateur_mlflow_lag_seconds", None): 12.0,
    }
    assert {name for name, _ in Noted.kept} == set(GAUGES)
