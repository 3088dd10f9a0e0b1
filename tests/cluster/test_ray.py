"""Real Ray: the same bits as without it, any number of workers, Ctrl-C, jobs. Kills are among the fault tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from head import DASHBOARD, Head
from safetensors.torch import load_file
from support import ROOT, alone_on_the_network, environment, hearing_ctrl_c, program
from tiny_run import NO_SCAN, carry_out, to_yaml

from pipeline.settings.config import load_config

pytestmark = pytest.mark.ray
SOLVED = ["prune.allocation=budget", "scan.together=[0.5,0.2]"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run's file; `alone`, solved by a budget, was carried out without Ray."""
    path = to_yaml(tmp_path_factory.mktemp("alone"))
    done = program("pipeline", "run", str(path), "name=alone", *SOLVED, ray=False, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    return path


def result(runs: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((runs / name / "result.json").read_text()))


def same_weights(runs: Path, first: str, second: str) -> bool:
    one, two = (load_file(runs / name / "final/model.safetensors") for name in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_one_worker_under_ray_and_without_it_give_the_same_bits(apart: Path) -> None:
    runs = apart.parent / "runs"
    under = program("cluster", "run", str(apart), "name=under-ray", *SOLVED)
    assert under.returncode == 0, under.stderr + under.stdout
    assert same_weights(runs, "alone", "under-ray")
    assert result(runs, "alone")["test"] == result(runs, "under-ray")["test"]
    scans = [json.loads((runs / name / "scan/scan.json").read_text()) for name in ("alone", "under-ray")]
    assert scans[0] == scans[1]
    assert len(scans[0]["together"]) == 10  # two densities, five powers


def sample_order(run: Path) -> list[str]:
    """For each epoch of the run, a digest of which samples were seen at which step."""
    parts = [run / "dense/metrics.json", *sorted(run.glob("rounds/[0-9]*/metrics.json")), run / "rounds/control.json"]
    return [entry["order"] for part in parts for entry in json.loads(part.read_text())["history"]]


def test_uneven_workers_see_the_same_samples_at_the_same_steps(apart: Path) -> None:
    """3 workers share 8 lanes, and 2 cores."""
    runs = apart.parent / "runs"
    carry_out(load_config(apart, ["name=w1", NO_SCAN]))
    three = program("cluster", "run", str(apart), "name=w3", NO_SCAN, "cluster.workers=3")
    assert three.returncode == 0, three.stderr + three.stdout
    logs = sorted(path.name for path in (runs / "w3/log").iterdir())
    stages = ("dense", "rounds")
    assert logs == [
        *(f"0001-{stage}-1-rank-{rank}.jsonl" for stage in stages for rank in range(3)),
        "driver-0001.jsonl",
    ]
    for name in logs:
        last = json.loads((runs / "w3/log" / name).read_text().splitlines()[-1])
        assert (last["event"], last["message"]) == ("Ended", "ended well")
    assert sample_order(runs / "w3") == sample_order(runs / "w1")
    assert len(set(sample_order(runs / "w1"))) == 3 + 2 + 2  # the control sees what the rounds saw
    assert result(runs, "w3")["weights_kept"] == result(runs, "w1")["weights_kept"] == 50200 // 6
    drop = result(runs, "w1")["test"]["pruned"]["top1"] - result(runs, "w3")["test"]["pruned"]["top1"]
    assert abs(drop) < 0.05


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"nothing like {pattern} came"
        time.sleep(0.02)


def test_ctrl_c_under_ray_keeps_the_state_and_prints_the_command_that_goes_on(tiny_yaml: Path) -> None:
    runs = tiny_yaml.parent / "runs"
    command = [*alone_on_the_network(), sys.executable, "-m", "cluster", "run", str(tiny_yaml), NO_SCAN]
    process = subprocess.Popen(
        hearing_ctrl_c([*command, "dense.epochs=100000"]),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for("dense/steps/*/manifest.json", runs / "tiny", process)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"To go on: secateur run {tiny_yaml} {NO_SCAN} dense.epochs=100000" in errors
    assert "Traceback" not in errors
    assert list((runs / "tiny").glob("dense/steps/*/manifest.json"))


def test_a_mistake_that_one_rank_meets_alone_ends_all_of_them_with_its_message(tiny_yaml: Path, tmp_path: Path) -> None:
    """A label that was changed after indexing: only the rank that streams that sample sees it."""
    out = tmp_path / "shards"
    assert program("cluster", "shards", "build", str(tiny_yaml), str(out), ray=False).returncode == 0
    tar = next(out.glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    header = content.index(b"00000700", 0)
    label = content.index(b".cls", header) - 8 + 512
    assert chr(content[label]).isdigit(), content[label - 20 : label + 20]
    content[label] = ord("7") if content[label] != ord("7") else ord("8")
    tar.write_bytes(content)
    started = time.monotonic()
    overrides = ["data.source=shards", f"data.root={out}", "data.cache_bytes=0", "cluster.workers=2", NO_SCAN]
    done = program("cluster", "run", str(tiny_yaml), *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "00000700" in done.stderr
    assert time.monotonic() - started < 390  # not gloo's half hour


def test_a_finished_run_is_shown_without_starting_ray(apart: Path) -> None:
    started = time.monotonic()
    again = program("cluster", "run", str(apart), "name=alone", *SOLVED, ray=False, RAY_ADDRESS="127.0.0.1:1")
    assert again.returncode == 0, again.stderr
    assert "skipped" in again.stdout
    assert time.monotonic() - started < 60


def test_a_cluster_without_what_is_asked_for_is_one_message(tiny_yaml: Path) -> None:
    done = program("cluster", "run", str(tiny_yaml), "cluster.gpus_per_worker=1", "cluster.workers=2")
    assert done.returncode == 2
    assert "cluster.workers=2 with 1 GPU each" in done.stderr
    assert "the cluster has 0" in done.stderr
    gone = program("cluster", "run", str(tiny_yaml), "cluster.address=127.0.0.1:6666")
    assert gone.returncode == 75
    assert "cluster.address=127.0.0.1:6666" in gone.stderr


@pytest.mark.timeout(1800)
def test_the_exit_code_and_the_log_of_a_job_come_back(head: Head, tmp_path: Path) -> None:
    """Jobs that are cancelled, and go on when submitted again, are among the fault tests (test_jobs.py)."""
    config, address = "configs/demo.yaml", f"--address={DASHBOARD}"
    small = [NO_SCAN, "dense.epochs=1", "retrain.epochs=1", "prune.rounds=1", "prune.dense_control=false"]
    job = ["ray", "job", "submit", address, "--working-dir", ".", "--", "python", "-m", "cluster", "run", config]

    relative = head.run(*job, *small, "name=job")
    assert relative.returncode != 0
    assert "runs_dir=runs is relative" in relative.stdout + relative.stderr

    absolute = [f"runs_dir={tmp_path / 'runs'}", "tracking.enabled=false", *small]
    ran = head.run(*job, "name=job", *absolute)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "rounds/01: epoch 1/1" in ran.stdout
    assert "compression" in ran.stdout
    assert result(tmp_path / "runs", "job")["weights_kept"] > 0

    client = head.run("secateur", "submit", config, "--address", DASHBOARD, "name=job", *absolute)
    assert client.returncode == 0, client.stdout + client.stderr
    assert "skipped" in client.stdout
    wrong = head.run(
        "secateur", "submit", config, "--address", DASHBOARD, "name=x", *absolute, "seed=1",
        "model.factory=nowhere:build",
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "model.factory" in wrong.stdout

    for wrong_token in ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_TOKEN": "", "RAY_AUTH_MODE": "disabled"}):
        refused = head.run(*job, "name=job", *absolute, **wrong_token)
        assert refused.returncode not in (0, None)
        assert "Authentication" in refused.stdout + refused.stderr
        ours = head.run("secateur", "submit", config, "--address", DASHBOARD, "name=job", *absolute, **wrong_token)
        assert ours.returncode == 2, ours.stdout + ours.stderr
        errors = [text for text in ours.stderr.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1, ours.stderr
        assert "RAY_AUTH_TOKEN" in errors[0]
        assert "Traceback" not in ours.stderr
