"""`reproduce` from the command to its pages, on real digits written as MNIST's files; without Ray."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline.__main__ import command_line as main
from pipeline.base.errors import UserError
from pipeline.paper import reproduce
from pipeline.train.loop import Training

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ["dense.epochs=2", "dense.batch_size=64", "retrain.epochs=1", "retrain.batch_size=64", "tracking.enabled=false"]
NETWORK = [*SMALL, "prune.rounds=2", "scan.levels=[0.5,0.1]"]
CURVES = [*SMALL, "dense.steps=15", "retrain.steps=5", "prune.list=[0.3,0.05]", "scan.levels=[0.5,0.1]"]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits, each pixel three times as high and wide and two more around, as idx files."""
    digits = load_digits()
    images = np.pad((digits.images * 15.9).astype(np.uint8).repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    assert images.shape[1:] == (28, 28)
    folder = tmp_path_factory.mktemp("mnist")
    for name, part in (("train", slice(0, 700)), ("t10k", slice(700, 1000))):
        few, labels = images[part], digits.target[part].astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *few.shape) + few.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(labels)) + labels.tobytes())
    return folder


@pytest.fixture
def command(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs `reproduce ...` on the miniature data; returns what it printed."""

    def call(*args: str) -> str:
        options = ["--data", str(mnist), "--runs-dir", str(tmp_path / "runs")]
        monkeypatch.setattr(sys, "argv", ["pipeline", "reproduce", *args, *options])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        written = capfd.readouterr()
        assert ended.value.code == 0, written.err
        return written.out

    return call


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_network_is_run_for_each_seed_and_stands_beside_the_paper(
    command: Callable[..., str], tmp_path: Path
) -> None:
    printed = command("lenet-300-100", "--seeds", "0,3", *NETWORK)
    folder = tmp_path / "runs/reproduce/lenet-300-100"
    found, page = read(folder / "result.json"), (folder / "reproduce.md").read_text()
    runs = [read(folder / f"seed-{seed}/result.json") for seed in (0, 3)]
    assert [run["seed"] for run in runs] == [0, 3]
    errors = [1 - run["test"]["pruned"]["top1"] for run in runs]
    assert errors[0] != errors[1]
    assert found["table1"]["test_error_pruned"]["mean"] == pytest.approx(sum(errors) / 2)
    assert found["table1"]["compression"]["mean"] == pytest.approx(runs[0]["compression"])
    assert [row["name"] for row in found["layers"]] == ["fc1", "fc2", "fc3", "total"]
    assert found["layers"][1]["density"]["mean"] == pytest.approx(sum(run["layers"][1]["density"] for run in runs) / 2)
    assert found["test_looks"] == 2
    for number in (4, 6, 7):
        assert (folder / f"figure{number}.png").read_bytes().startswith(PNG)
        assert f"(figure{number}.png)" in page
    assert "Table 1, LeNet-300-100" in printed
    assert "The paper's row" in printed

    again = command("lenet-300-100", "--seeds", "0,3", *NETWORK)
    assert again.count("finished before, skipped") == 10
    assert "epoch" not in again
    assert read(folder / "result.json") == found


def test_figure_5_has_five_curves_of_both_networks_and_resumes(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Training._update

    def stop(self: Training, *args: Any) -> None:
        if self.phase == "rounds/02":
            raise RuntimeError("stopped by the test")
        original(self, *args)

    monkeypatch.setattr(Training, "_update", stop)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        command("figure5", *CURVES)
    monkeypatch.setattr(Training, "_update", original)
    printed = command("figure5", *CURVES)
    folder = tmp_path / "runs/reproduce/figure5"
    first = printed.split("LeNet-300-100, L1")[0]
    assert "rounds/02: epoch 1/1" in first
    assert "dense: epoch" not in first
    assert "figure5/02" not in first
    assert "rounds/01" not in first
    parts = read(folder / "result.json")["networks"]
    assert [part["network"] for part in parts] == ["lenet-300-100", "lenet-5"]
    for part in parts:
        runs = folder / part["network"]
        assert len(part["curves"]) == 5
        points = {curve["name"]: curve["points"] for curve in part["curves"]}
        assert all([p["density"] for p in line] == pytest.approx([0.3, 0.05], abs=1e-4) for line in points.values())
        dense = read(runs / "l2/dense/metrics.json")["val"]["top1"]
        pruned = read(runs / "l1/figure5/02/metrics.json")
        assert points["L1, not retrained"][1]["loss"] == dense - pruned["val_before_retrain"]["top1"]
        assert points["L1, retrained"][1]["top1"] == pruned["val"]["top1"]
        chain = read(runs / "l2/rounds/02/metrics.json")
        assert points["L2, iterative prune and retrain"][1]["top1"] == chain["val"]["top1"]
        assert not (runs / "l1/rounds/01").exists()
        assert not (runs / "l2/test_looks.jsonl").exists()
        assert (folder / f"figure5-{part['network']}.png").read_bytes().startswith(PNG)
    assert "With retraining, L2 is better than L1: " in (folder / "reproduce.md").read_text()
    assert "epoch" not in command("figure5", *CURVES)


def test_the_two_regularisers_are_trained_apart(mnist: Path, tmp_path: Path) -> None:
    (job,) = jobs("figure5", str(mnist), tmp_path)
    strengths = {key: (run.dense.weight_decay > 0, run.retrain.l1 > 0) for key, run in job.runs.items()}
    assert strengths["lenet-5", "l2"] == (True, False)
    assert strengths["lenet-5", "l1"] == (False, True)
    assert len(strengths) == 4


def jobs(target: str, data: str | None, tmp_path: Path, *overrides: str, **options: Any) -> list[reproduce.Job]:
    wanted = reproduce.Wanted(target, data, runs_dir=str(tmp_path / "runs"), **options)
    return reproduce.jobs(wanted, overrides)


def test_all_is_both_networks_and_figure_5_with_three_seeds(
    mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "mnist").symlink_to(mnist)
    monkeypatch.setenv("SECATEUR_DATA", str(data))
    found = jobs("all", None, tmp_path)
    assert [job.name for job in found] == ["lenet-300-100", "lenet-5", "figure5"]
    assert [run.seed for run in found[0].runs.values()] == [0, 1, 2]
    assert all(run.data.root == str(data / "mnist") for job in found for run in job.runs.values())
    shifted = {job.name for job in found for run in job.runs.values() if run.data.augment}
    assert shifted == {"lenet-5"}  # which its file says, and why


@pytest.mark.parametrize(
    ("target", "overrides", "options", "words"),
    [
        ("lenet-30-100", [], {}, ["TARGET", "lenet-30-100", "did you mean 'lenet-300-100'"]),
        ("lenet-5", [], {"data": None}, ["--data", "SECATEUR_DATA"]),
        ("lenet-5", [], {"seeds": "0,0"}, ["--seeds=0,0"]),
        ("lenet-5", [], {"seeds": "a"}, ["--seeds=a"]),
        ("lenet-5", ["seed=3"], {}, ["seed=3", "--seeds"]),
        ("lenet-5", [], {"configs": Path("nowhere")}, ["--configs=nowhere", "lenet-5.yaml"]),
        ("lenet-5", ["prune.round=1"], {}, ["prune.round", "did you mean"]),
        ("figure5", [], {"networks": "lenet-6"}, ["--networks", "lenet-6"]),
        ("figure5", ["retrain.l1=0"], {}, ["retrain.l1=0"]),
        ("figure5", ["prune.schedule=one-shot"], {}, ["prune.schedule=one-shot", "prune.list"]),
    ],
)
def test_a_mistake_is_one_message(
    mnist: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    overrides: list[str],
    options: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.delenv("SECATEUR_DATA", raising=False)
    data = options.pop("data", str(mnist))
    with pytest.raises(UserError) as raised:
        jobs(target, data, tmp_path, *overrides, **options)
    assert all(word in str(raised.value) for word in words), raised.value
