"""The command line: what each command prints, and one message with exit code 2 for each mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import ROOT, alone_on_the_network, environment, hearing_ctrl_c, program

from cluster.cli import app as cluster_app
from cluster.cli import command_line as cluster_main
from pipeline import stages
from pipeline.__main__ import app as pipeline_app
from pipeline.__main__ import command_line as pipeline_main
from pipeline.base.errors import UserError
from pipeline.base.version import VERSION
from pipeline.local import LocalEngine
from pipeline.run.events import unheard
from pipeline.run.state import open_run
from pipeline.settings.config import Config
from pipeline.train.world import World


@pytest.mark.parametrize("module", ["cluster", "pipeline"])
def test_plan_prints_config_tensors_and_rounds_and_runs_nothing(tiny_yaml: Path, module: str) -> None:
    done = program(module, "plan", str(tiny_yaml), "prune.allocation=erk", "--full", ray=False)
    assert done.returncode == 0, done.stderr
    for words in ("allocation: erk", "fc1.weight", "19,200", "fc1.bias", "8,366", "1,293 train"):
        assert words in done.stdout
    assert not (tiny_yaml.parent / "runs").exists()


def test_plan_shows_several_budgets_of_a_scan_without_scanning_again(
    tiny: Callable[..., Config], tmp_path: Path, secateur: Callable[..., str]
) -> None:
    config = tiny(**{"dense.epochs": 1, "prune.allocation": "budget"})
    with open_run(config) as here:
        stages.scan(config, LocalEngine(World(0, 1, torch.device("cpu"))), here, unheard)
    path, figure = tmp_path / "runs/tiny/config.yaml", tmp_path / "curve.svg"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    shown = secateur("plan", str(path))
    assert "predicted rise of the loss" in shown
    shown = secateur("plan", str(path), "--budgets", "2,4,16", "--figure", str(figure))
    for words in ("2x", "4x", "16x", "25,100", "12,550", "3,137", "fc3.weight", "at most above", "full bar is chance"):
        assert words in shown
    assert "composed by the power" in shown
    assert "is assumed" not in shown
    made = json.loads(secateur("plan", str(path), "--budgets", "2,4,16", "--json"))
    assert [(each["compression"], each["kept"]) for each in made["asked"]] == [(2, 25100), (4, 12550), (16, 3137)]
    assert sum(made["asked"][0]["solution"]["keep"].values()) == 25100
    assert 0 <= made["asked"][0]["rise"] <= made["asked"][2]["rise"]
    shown = secateur("plan", str(path), "target.budget=flops", "--budgets", "4")
    assert "25,100" in shown  # of 100,400 FLOPs
    assert figure.read_text().startswith("<svg")
    figure.unlink()
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"--figure .*give --budgets"):
        secateur("plan", str(path), "--figure", "x.svg")
    with pytest.raises(UserError, match=r"x\.pdf: .*\.svg or \.png"):
        secateur("plan", str(path), "--budgets", "2", "--figure", "x.pdf")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "CONFIG", "prune.round=3"], ["prune.round", "did you mean 'prune.rounds'"]),
        (["run", "CONFIG", "prune.allocation=globl"], ["prune.allocation", "globl", "known"]),
        (["run", "CONFIG", "prune.criterion=magnitud"], ["prune.criterion", "magnitude"]),
        (["run", "CONFIG", "model.factory=torchvision.models.squeezenet9"], ["squeezenet9", "did you mean"]),
        (["run", "CONFIG", "model.factory=nowhere:build"], ["model.factory", "nowhere"]),
        (["run", "CONFIG", "prune.exclude=[fc9.*]"], ["fc9.*"]),
        (["run", "CONFIG", "target.compression=1000000"], ["target.compression"]),
        (["run", "CONFIG", "data.source=idx", "data.root=/nowhere"], ["/nowhere"]),
        (["run", "CONFIG", "device=cuda"], ["device=cuda", "no GPU"]),
        (["run", "CONFIG", "device=cuda", "cluster.gpus_per_worker=1"], ["device=cuda", "no GPU"]),  # without Ray
        (["run", "CONFIG", "target.budget=flops"], ["target.budget=flops", "prune.allocation=budget"]),
        (["run", "CONFIG", "prune.floors={fc9.weight: 0.5}"], ["prune.floors", "fc9.weight", "did you mean"]),
        (["run", "CONFIG", "prune.ceilings={'*': 0.01}"], ["above the 502", "prune.ceilings"]),
        (["plan", "CONFIG", "--budgets", "2,x"], ["--budgets 2,x", "2,4,8"]),
        (["plan", "CONFIG", "--budgets", "2"], ["has none yet", "secateur scan"]),
        (["bench", "CONFIG", "--table", "t", "--batches", "8,1"], ["--batches 8,1", "target.latency_batch=8"]),
        (["bench", "CONFIG", "--table", "t", "--repeats", "9"], ["--repeats 9", "--table", "leave it out"]),
        (["run", "missing.yaml"], ["missing.yaml", "does not exist"]),
        (["report", "nowhere"], ["nowhere", "is not a run"]),
        (["sync", "nowhere"], ["nowhere", "is not a run"]),
        (["list", "nowhere"], ["nowhere", "holds no run"]),
        (["status", "nowhere"], ["nowhere", "is not a run", "secateur list"]),
        (["watch", "nowhere"], ["nowhere", "is not a run"]),
        (["logs", "nowhere"], ["nowhere", "is not a run"]),
        (["compare", "nowhere"], ["nowhere", "not finished", "secateur status"]),
        (["init", "--data", "nowhere", "--out", "new.yaml"], ["nowhere", "does not exist"]),
        (["ui", "nowhere"], ["mlflow.db", "does not exist"]),
        (["shards", "verify", "nowhere"], ["nowhere", "manifest.json"]),
        (["submit", "CONFIG"], ["below the current folder"]),
    ],
)
def test_a_mistake_is_one_message_and_code_2(
    tiny_yaml: Path,
    args: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    args = [str(tiny_yaml) if arg == "CONFIG" else arg for arg in args]
    monkeypatch.setattr(sys, "argv", ["secateur", *args])
    with pytest.raises(SystemExit) as ended:
        pipeline_main() if args[0] == "run" else cluster_main()
    written = capfd.readouterr()
    assert ended.value.code == 2, written
    errors = [line for line in written.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, written.err
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in written.out + written.err


def test_shards_are_built_verified_and_a_damaged_one_is_named(tiny_yaml: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    built = program("cluster", "shards", "build", str(tiny_yaml), str(out), ray=False)
    assert built.returncode == 0, built.stderr
    assert "train: 1,293 samples" in built.stdout
    assert program("cluster", "shards", "verify", str(out), ray=False).returncode == 0
    tar = next(out.glob("val-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-5000])
    harmed = program("cluster", "shards", "verify", str(out), ray=False)
    assert harmed.returncode == 2
    assert tar.name in harmed.stdout


def test_ctrl_c_keeps_the_state_and_prints_the_command_that_goes_on(tiny_yaml: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "run", str(tiny_yaml), "dense.epochs=100000"]
    process = subprocess.Popen(
        hearing_ctrl_c(command), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    steps = tiny_yaml.parent / "runs/tiny/dense/steps"
    deadline = time.monotonic() + 120
    while not list(steps.glob("*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 130
    assert f"To go on: python -m pipeline run {tiny_yaml} dense.epochs=100000" in errors
    assert "Traceback" not in errors
    assert list(steps.glob("*/manifest.json"))


def test_torchrun_gives_the_kept_counts_and_the_sample_order_of_one_process(tiny_yaml: Path) -> None:
    one = program("pipeline", "run", str(tiny_yaml), "name=one", ray=False)
    assert one.returncode == 0, one.stderr
    prefix = alone_on_the_network()
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline", "run"]
    two = subprocess.run(
        [*command, str(tiny_yaml), "name=two"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    results = [json.loads((tiny_yaml.parent / f"runs/{name}/result.json").read_text()) for name in ("one", "two")]
    assert results[0]["weights_kept"] == results[1]["weights_kept"]
    assert abs(results[0]["test"]["pruned"]["top1"] - results[1]["test"]["pruned"]["top1"]) < 0.05


def test_without_a_terminal_the_log_is_plain_lines(tiny_yaml: Path) -> None:
    done = program("pipeline", "run", str(tiny_yaml), ray=False, SECATEUR_LINE_SECONDS="3600")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert any("dense: epoch 3/3" in line for line in lines)  # the end of a training always has its line
    assert not any("dense: epoch 1/3" in line for line in lines)  # and an epoch of a moment has none
    assert os.path.exists(tiny_yaml.parent / "runs/tiny/report.html")


LOADS = "import sys; from cluster.cli import app; app(sys.argv[1:], standalone_mode=False); print(sorted(sys.modules))"


@pytest.mark.parametrize("args", [["--help"], ["run", "-h"], ["shards", "build", "-h"], ["list", "nowhere", "-h"]])
def test_help_comes_by_h_too_and_loads_nothing_heavy(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *args], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    help_text, _, loaded = done.stdout.rpartition("[")
    assert "Usage:" in help_text
    for heavy in ("torch", "ray", "mlflow", "numpy", "rich.console", "matplotlib"):  # typer itself loads pydantic
        assert f"'{heavy}'" not in loaded


def test_both_programs_have_the_commands_that_need_no_ray(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name, app in (("cluster", cluster_app), ("pipeline", pipeline_app)):
        app(["-h"], standalone_mode=False)
        text = capsys.readouterr().out.partition("Commands:")[2]
        shown[name] = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert shown["cluster"] - shown["pipeline"] == {"scan", "submit"}
    assert shown["pipeline"] <= shown["cluster"]
    assert {"list", "status", "watch", "logs", "compare", "doctor", "init", "plan", "run"} <= shown["pipeline"]


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    cluster_app(["--version"], standalone_mode=False)
    assert capsys.readouterr().out == f"secateur {VERSION}\n"


def test_every_config_names_the_schema_that_travels_in_the_package() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (path.parent / first.partition("=")[2]).resolve() == ROOT / "pipeline/settings/schema.json"
