"""`secateur plan`: about ten lines that say what a run would do, and everything with --full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import plan
from pipeline.network.survey import LeftOut
from pipeline.rounds import duration, outlook
from pipeline.settings.config import Config


def test_a_plan_is_about_ten_lines_with_time_memory_and_disk(tiny_yaml: Path, secateur: Callable[..., str]) -> None:
    shown = secateur("plan", str(tiny_yaml), "prune.allocation=erk")
    lines = shown.splitlines()
    assert 9 <= len(lines) <= 13
    for words in ("50,200 weights in 3 tensors (3 fc)", "3 tensors stay as they are: 3 bias", "1,293 train", "8,366"):
        assert words in shown
    [time] = [line for line in lines if line.startswith("time")]
    assert "of training an image, measured here (cpu)" in time
    assert "allocation: erk" not in shown
    assert not (tiny_yaml.parent / "runs").exists()


def test_a_plan_for_scripts(tiny_yaml: Path, secateur: Callable[..., str]) -> None:
    made = json.loads(secateur("plan", str(tiny_yaml), "prune.allocation=uniform", "--json"))
    assert [row["kept"] for row in made["rounds"]][-1] == 50200 // 6
    assert made["seconds"] > 0
    # Weights, gradients and momentum of 50,610 parameters, and a byte of mask for each of the 50,200 prunable ones.
    assert made["memory_bytes"] == 3 * 4 * 50610 + 50200


def test_tensors_that_stay_are_grouped_by_the_reason() -> None:
    biases = [LeftOut(f"fc{n}.bias", (3,), "bias") for n in range(3)]
    assert plan.stays([*biases, LeftOut("e.weight", (2, 3), "embedding")]) == (
        "4 tensors stay as they are: 3 bias; embedding"
    )
    many = [LeftOut(f"t{n}", (1,), f"reason {n}") for n in range(8)]
    assert plan.stays(many).endswith("; 3 for other reasons")
    assert plan.stays([]) == ""


def test_a_run_whose_gpus_are_elsewhere_has_no_time_and_says_why(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"cluster.gpus_per_worker": 1, "device": "cpu", "prune.allocation": "uniform"})
    made = outlook.make(config)
    needed, outline = plan.needs(config, made)
    assert needed.seconds is None
    assert any("not known: cluster.gpus_per_worker=1" in line for line in plan.summary(config, made, needed, outline))


def test_the_time_is_that_of_the_images_at_the_measured_pace(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = {"dense": 0.001, "retrain": 0.002}
    monkeypatch.setattr(duration, "per_image_s", lambda config, name, settings, classes: paces[name])
    config = tiny(**{"prune.allocation": "uniform", "cluster.workers": 2})
    needed, _ = plan.needs(config, outlook.make(config))
    # 3 epochs of 20 steps of 64; two rounds and as much control, each of 2 epochs; two workers.
    assert needed.seconds == pytest.approx((3840 * 0.001 + 2 * 2 * 2560 * 0.002) / 2)
