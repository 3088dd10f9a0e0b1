"""Shared by all tests: tiny runs on real digits, and real data where it is."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from head import Head, answering_head
from hypothesis import settings
from small import SMALL
from support import S3_ENVIRONMENT, free_port, start_moto
from tiny_run import TINY, merged, to_yaml
from tracking_server import TrackingServer

from pipeline import stages
from pipeline.local import LocalEngine
from pipeline.run.events import unheard
from pipeline.run.state import open_run
from pipeline.settings.config import Config, parse_config
from pipeline.storage import s3 as boto
from pipeline.train.loop import Training
from pipeline.train.session import Session, open_session
from pipeline.train.world import World

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of an example
settings.load_profile("untimed")
# Ray starts its workers at nice 15: whatever else runs on this machine, other tests too, would stop them nearly.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: begun last, one of them would keep one core busy for minutes, alone."""
    long = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Config]:
    """Makes the config of a tiny run in a temporary folder; keyword `changes` holds `a.b` keys."""

    def make(**changes: Any) -> Config:
        return parse_config(merged({**TINY, "runs_dir": str(tmp_path / "runs")}, changes))

    return make


@pytest.fixture(scope="session")
def small_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """The session of a tiny run on `small.network`, whose shards are built and nothing else."""
    config = parse_config(merged({**TINY, "runs_dir": str(tmp_path_factory.mktemp("small"))}, SMALL))
    with open_run(config) as here:
        alone = World(0, 1, torch.device("cpu"))
        stages.carry_out([stages.SHARDS], stages.Driver(config, LocalEngine(alone), here, unheard))
        yield open_session(config, alone, here, unheard)


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Makes a phase stop, as if killed, after some updates; nothing of ours runs afterwards."""
    original = Training._update

    def arm(phase: str, step: int) -> None:
        def update(self: Training, *args: Any) -> None:
            if self.phase == phase and self.position.step == step:
                raise KeyboardInterrupt
            original(self, *args)

        monkeypatch.setattr(Training, "_update", update)

    yield arm
    monkeypatch.undo()


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> Path:
    """A tiny run as a file, for the command line."""
    return to_yaml(tmp_path)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    where = os.environ.get("SECATEUR_DATA", "")
    if not where or not Path(where).is_dir():
        pytest.skip("real data is not here: set SECATEUR_DATA to its folder")
    return Path(where)


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The endpoint of a server that speaks S3 (moto's)."""
    port = free_port()
    server = start_moto(port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket, as s3://name; this process and its children are set up for it."""
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": moto}.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    boto.client.cache_clear()
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    boto.client().create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    boto.client.cache_clear()


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """An MLflow server with users."""
    server = TrackingServer(tmp_path_factory.mktemp("mlflow"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def tracking_server(running_server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> TrackingServer:
    """The MLflow server; this process and its children have the password of its first user."""
    for name, value in running_server.user.items():
        monkeypatch.setenv(name, value)
    return running_server


@pytest.fixture
def secateur(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """secateur("report", RUN) carries out a command line in this process and returns what it prints."""
    from cluster.cli import app

    def run(*args: str) -> str:
        capsys.readouterr()
        app(list(args), standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def head() -> Iterator[Head]:
    """A Ray head that answers, in a network of its own."""
    with answering_head() as started:
        yield started
