"""No secret of the environment or of a URL reaches a message, a file, a store, MLflow or a Ray job."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import free_port
from tracking_server import TrackingServer

from cluster.cli import command_line as cluster_main
from pipeline.__main__ import command_line as pipeline_main
from pipeline.cli.messages import one_message
from pipeline.storage import s3 as boto

SMALLER = ["dense.epochs=1", "prune.rounds=1", "retrain.epochs=1", "prune.allocation=uniform"]

Said = Callable[..., tuple[Any, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Said:
    """said(main, "run", ...) carries out a command line; returns its exit code and all that it wrote."""

    def run(main: Callable[[], None], *args: str) -> tuple[Any, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["secateur", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, "".join(capfd.readouterr())

    return run


def stored(bucket: str) -> dict[str, bytes]:
    """Every object of a bucket."""
    pages = boto.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
    return {key: boto.client().get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_leaves_no_secret_behind(
    s3: str, tracking_server: TrackingServer, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")
    hidden = {name: secrets.token_hex(20) for name in names}
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    boto.client.cache_clear()
    run = f"{s3}/runs/tiny"
    command = ["run", str(tiny_yaml), *SMALLER, "tracking.enabled=true", f"tracking.uri={tracking_server.uri}"]
    with monkeypatch.context() as wrong:
        hidden["a wrong password"] = secrets.token_hex(20)
        wrong.setenv("MLFLOW_TRACKING_PASSWORD", hidden["a wrong password"])
        wrongly = said(pipeline_main, *command, f"runs_dir={s3}/runs")
        assert wrongly[0] == 0
        assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in wrongly[1]
        assert wrongly[1].count(f"secateur sync {run}") == 1
        assert said(cluster_main, "sync", run, "--uri", tracking_server.uri)[0] == 2
    hidden["MLFLOW_TRACKING_PASSWORD"] = tracking_server.password
    synced = said(cluster_main, "sync", run, "--uri", tracking_server.uri)
    assert synced[0] == 0, synced
    assert tracking_server.uri in synced[1]
    nowhere = said(pipeline_main, *command, f"runs_dir=s3://nowhere-{secrets.token_hex(4)}/runs")
    assert nowhere[0] == 2
    everywhere = {"output": "".join(text for _, text in (wrongly, synced, nowhere)).encode()}
    everywhere |= {f"s3: {key}": data for key, data in stored(s3.removeprefix("s3://")).items()}
    everywhere |= {f"MLflow: {name}": data for name, data in files(tracking_server.home).items()}
    everywhere |= {f"disk: {name}": data for name, data in files(tiny_yaml.parent).items()}
    found = [(place, name) for place, data in everywhere.items() for name, s in hidden.items() if s.encode() in data]
    assert found == []
    result = json.loads(everywhere["s3: runs/tiny/result.json"])
    run_id = result["mlflow"]["run_id"].encode()
    assert run_id in everywhere["MLflow: mlflow.db"]
    kept = {place.rpartition("/")[2] for place in everywhere if place.startswith("MLflow: files/")}
    assert {"config.yaml", "result.json", "report.html", "model.safetensors", "plan.json"} <= kept


def test_a_job_is_sent_no_secret(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    sent: list[Any] = []

    class Recorder:
        """Stands where Ray's client does, and keeps what it is given."""

        def __init__(self, *args: Any, **more: Any) -> None:
            sent.extend([args, more])

        def list_jobs(self) -> list[Any]:
            return []

        def __getattr__(self, name: str) -> Callable[..., str]:
            return lambda *args, **more: sent.extend([name, args, more]) or "job"

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Recorder)
    monkeypatch.chdir(tiny_yaml.parent)
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")
    hidden = {name: secrets.token_hex(20) for name in names}
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    code, text = said(cluster_main, "submit", "tiny.yaml", f"runs_dir={tiny_yaml.parent}/runs", "--no-wait")
    assert code == 0, text
    assert "submit_job" in sent
    assert "python -m cluster run tiny.yaml" in str(sent)
    assert [name for name, value in hidden.items() if value in str(sent) + text] == []
    assert ".env" in str(sent)  # left out of the working directory


@pytest.mark.parametrize(
    "setting",
    [
        "tracking.uri=http://ann:hunter2@127.0.0.1:5000",
        "tracking.uri=postgresql://ann:hunter2@127.0.0.1/mlflow",
        "data.root=https://host/x?X-Amz-Credential=a&X-Amz-Signature=hunter2",
        "model.checkpoint=https://hunter2@host/x.pth",
        "model.kwargs.weights=[https://host/x?token=hunter2]",
    ],
)
def test_a_setting_with_a_secret_is_refused_and_not_repeated(
    setting: str, tiny_yaml: Path, tmp_path: Path, said: Said
) -> None:
    code, text = said(pipeline_main, "run", str(tiny_yaml), setting)
    assert code == 2
    assert f"{setting.partition('=')[0]} is a URL with a password or a signature in it" in text
    assert "hunter2" not in text
    assert list(tmp_path.iterdir()) == [tiny_yaml]


def test_a_url_on_the_command_line_is_shown_without_its_secret(
    tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.setenv("SECATEUR_STORAGE_RETRIES", "0")
    place = f"http://127.0.0.1:{free_port()}"
    for wanted, main, *args in (
        (75, pipeline_main, "run", f"{place}/tiny.yaml?X-Amz-Signature=hunter2"),
        (2, pipeline_main, "run", f"http://ann:hunter2@{place[7:]}/tiny.yaml"),  # refused before it is asked
        (75, cluster_main, "shards", "verify", f"{place}/shards?sig=hunter2"),
        (2, cluster_main, "submit", f"{place}/tiny.yaml?sig=hunter2"),  # refused before it is read
    ):
        code, text = said(main, *args)
        assert code == wanted
        assert "127.0.0.1" in text
        assert "hunter2" not in text
    assert "holds a password or signature, which a job's command would show" in text


def test_the_command_that_goes_on_is_shown_without_a_secret(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), one_message(resume="secateur run https://host/c.yaml?sig=hunter2"):
        raise KeyboardInterrupt
    assert "secateur run https://host/c.yaml?sig=***" in capfd.readouterr().err
