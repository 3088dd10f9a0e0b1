"""`secateur doctor`: all is well on a healthy set-up, and what is broken is named with a remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support import free_port
from tiny_run import TINY

from pipeline.cli import doctor
from pipeline.settings.config import Config


def test_a_healthy_set_up_has_nothing_broken(tiny_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.show(str(tiny_yaml), [], (), as_json=True) == 0
    found = {each["what"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"versions", "GPU", "disk", "clock", "MLflow"} <= found.keys()
    assert all(each["state"] != "broken" for each in found.values())
    assert "free in" in found["disk"]["found"]
    assert not (tiny_yaml.parent / "runs").exists()


def test_what_is_broken_is_named_with_a_remedy_and_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = f"http://127.0.0.1:{free_port()}"
    file = tmp_path / "runs"
    file.write_text("a file, not a folder")
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump({**TINY, "runs_dir": str(file / "below"), "tracking": {"uri": server}}))
    assert doctor.show(str(path), [], (), as_json=False) == doctor.BROKEN
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BROKEN")]
    assert [line.split()[1] for line in lines] == ["disk:", "MLflow:"]
    assert "cannot be written" in lines[0]
    assert "Set runs_dir to a folder of yours" in lines[0]
    assert server in lines[1]
    assert "secateur sync RUN" in lines[1]


def test_files_that_a_config_names_and_are_not_here_are_broken(tmp_path: Path, tiny: Callable[..., Config]) -> None:
    config = tiny(**{"data.source": "folder", "data.root": str(tmp_path), "model.checkpoint": "/nowhere.pth"})
    here, gone = doctor.files(config)
    assert (here.state, gone.state) == ("ok", "broken")
    assert gone.found == "model.checkpoint=/nowhere.pth is not here"
    [elsewhere] = doctor.files(tiny(**{"model.checkpoint": "/nowhere.pth", "cluster.address": "10.0.0.1:10001"}))
    assert elsewhere.state == "warning"


def test_a_store_that_does_not_answer_is_broken_and_one_that_does_is_not(
    s3: str, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(runs_dir=f"{s3}/runs")
    [found] = doctor.s3(config)
    assert found.state == "ok"
    [away] = doctor.s3(tiny(runs_dir="s3://no-such-bucket-of-ours/runs"))
    assert away.state == "broken"
    assert away.remedy


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU")
def test_a_gpu_that_a_config_asks_for_and_is_not_here_is_broken(tiny: Callable[..., Config]) -> None:
    [found] = doctor.gpu(tiny(**{"cluster.gpus_per_worker": 1}))
    assert (found.state, found.what) == ("broken", "GPU")
    [found] = doctor.gpu(tiny(**{"cluster.gpus_per_worker": 1, "cluster.address": "head:6379"}))
    assert found.state == "warning"  # the work is done elsewhere
    [found] = doctor.gpu(None)
    assert found.state == "ok"
