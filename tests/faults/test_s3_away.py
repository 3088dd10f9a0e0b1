"""A store that is away for longer, with the waits and timeouts as they are by default."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.proxy import Fault, Proxy
from faults.runs import Line, OnS3
from tiny_run import TINY

from pipeline import storage
from pipeline.data import push, shards
from pipeline.settings.config import parse_config
from pipeline.storage import s3 as boto

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("kind", ["refuse", "stall", "reset"])
def test_a_stream_outlives_a_store_that_is_away_for_30_s(
    s3: str, moto: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = np.random.default_rng(0).integers(0, 256, 17 * 2**20, np.uint8).tobytes()
    storage.write_bytes(f"{s3}/big", content)
    monkeypatch.delenv("SECATEUR_STORAGE_BACKOFF_S")
    proxy = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    boto.client.cache_clear()
    back = threading.Timer(30, lambda: setattr(proxy, "fault", None))
    try:
        with storage.open_range(f"{s3}/big") as stream:
            first = stream.read(1000)
            proxy.fault = Fault(kind, times=-1)
            back.start()
            started = time.monotonic()
            assert first + stream.read() == content
        assert 30 <= time.monotonic() - started < 120
        assert proxy.made >= 2
    finally:
        back.cancel()
        proxy.close()


SETTINGS = [
    "prune.allocation=uniform", "data.source=shards", "data.cache_bytes=0", "dense.epochs=2", "retrain.epochs=8",
    "retrain.checkpoint_steps=20", "prune.rounds=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the tiny run on disk."""
    root = tmp_path_factory.mktemp("shards")
    shards.build(parse_config(TINY).data.model_copy(update={"shard_samples": 200}), 0, str(root))
    return root


@pytest.fixture
def stored(s3: str, shards_folder: Path) -> str:
    """A bucket that holds them."""
    push.push(str(shards_folder), f"{s3}/shards")
    return s3


UNDISTURBED: dict[str, tuple[float, dict[str, torch.Tensor]]] = {}  # what nothing happened to, once for all faults
FAULTS = {
    "S3 answers 503 SlowDown": Fault("refuse", times=8),
    "S3: reset in mid-body": Fault("reset", times=5, after=20_000, path="/shards/"),
    "S3: body cut short": Fault("cut", times=5, after=20_000, path="/shards/"),
    "S3: socket stalls": Fault("stall", times=2, after=20_000, path="/shards/"),
    "S3: slow link": Fault("slow", times=8, rate=200_000, path="/shards/"),
    "S3: answer to a write lost": Fault("forget", times=3, method="PUT"),
    "credentials failing three times": Fault("refuse", times=3, method="", status=400, code="ExpiredToken"),
    "S3 down for 30 s": Fault("reset", times=-1, method=""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_outlives_each_fault_of_its_store(name: str, stored: str, tiny_yaml: Path, moto: str, line: Line) -> None:
    away = name.endswith("30 s")
    waits = {"SECATEUR_STORAGE_TIMEOUT_S": "2", "SECATEUR_STORAGE_BACKOFF_S": "0.1"}
    proxy, settings = Proxy(moto), [*SETTINGS, f"data.root={stored}/shards"]
    try:
        if not UNDISTURBED:
            whole = OnS3(tiny_yaml, stored, proxy.url, "undisturbed", *settings, **waits)
            UNDISTURBED["run"] = whole.finish(), whole.weights()
        undisturbed, weights = UNDISTURBED["run"]
        waits |= {"SECATEUR_STORAGE_BACKOFF_S": "5"} if away else {}
        run = OnS3(tiny_yaml, stored, proxy.url, "fault", *settings, **waits)
        run.wait(run.has_a_checkpoint, poll=0.05)
        proxy.fault = dataclasses.replace(FAULTS[name])
        if away:
            time.sleep(30)
            proxy.fault = None
        seconds, found = run.finish(), run.weights()
        assert "resumed" not in run.output  # nothing is done twice
    finally:
        proxy.close()
    assert proxy.made >= 2
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[tensor], weights[tensor]) for tensor in found)
    line(name, "identical", 0, seconds - undisturbed)
