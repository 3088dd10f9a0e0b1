"""What came of a run in one sentence, and the command that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_files import begin, config, result, taken, whole

from pipeline.results import outcome
from pipeline.run.contents import read

LATENCY = {"device": "cpu", "batch": 1, "dense": 3.0, "pruned": 3.0, "compact": 1.5, "verdict": "compact is 2x faster"}


def changed(tmp_path: Path, **changes: Any) -> str:
    return outcome.sentence(taken(result(config(tmp_path), **changes)))


def test_all_that_came_of_it(tmp_path: Path) -> None:
    document = result(config(tmp_path), flops_density_weights=0.32, latency_ms=LATENCY)
    paired = {"only_dense_right": 41, "only_pruned_right": 43, "p_value": 0.9, "drop_ci95": [-0.001, 0.003]}
    document["test"]["against_dense"] = paired
    assert outcome.sentence(taken(document)) == (
        "13.7× smaller at 1.62% error, 0.02 points better than the network it came from (−0.30 to +0.10 points); "
        "3.1× fewer FLOPs; 2× faster on cpu at batch 1."
    )


@pytest.mark.parametrize(
    ("latency", "said"),
    [
        (None, "its speed is not measured yet (secateur bench)."),
        ({**LATENCY, "verdict": "no faster on cpu: all the same"}, "no faster on cpu."),
        ({**LATENCY, "compact": None}, "no faster on cpu at batch 1."),
    ],
)
def test_speed(tmp_path: Path, latency: Any, said: str) -> None:
    assert changed(tmp_path, latency_ms=latency).endswith(said)


def test_what_stays_dense_counts_in_the_whole_network(tmp_path: Path) -> None:
    """As many numbers again as are prunable stay: 19,424 of 266,200 and 266,200 of 266,200 make 1.86×."""
    document = result(config(tmp_path))
    document["bytes"]["dense_fp32"] = 4 * 2 * document["weights_total"]
    said = outcome.sentence(taken(document))
    assert said.startswith("13.7× fewer prunable weights, 1.9× fewer in all, at 1.62% error")


def test_where_nothing_was_pruned(tmp_path: Path) -> None:
    total = result(config(tmp_path))["weights_total"]
    said = changed(tmp_path, weights_kept=total, compression=1.0, density=1.0)
    assert said == "Nothing was pruned: the network handed over is the dense one."


@pytest.mark.parametrize(
    ("factory", "trusted"), [("lenet_300_100", False), ("torchvision.models.resnet18", False), ("mine.net:build", True)]
)
def test_the_command_that_repeats_a_run(tmp_path: Path, factory: str, trusted: bool) -> None:
    settings = config(tmp_path, model={"factory": factory})
    command = outcome.repeat_command(read(begin(settings)), f"{tmp_path}/lenet")
    assert command == f"secateur run {tmp_path}/lenet/config.yaml name=lenet-again{' --trust-code' * trusted}"


def test_a_network_no_better_is_said_to_be_so(tmp_path: Path) -> None:
    document = result(config(tmp_path))
    document["test"]["dense"] = document["test"]["pruned"]
    assert "as accurate as the network it came from" in outcome.sentence(taken(document))
    assert read(whole(config(tmp_path))).result is not None
