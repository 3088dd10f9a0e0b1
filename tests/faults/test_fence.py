"""A run on S3 whose writer lost it: to another writer, to its own silence, or to a store that cannot keep it to one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from faults.proxy import Fault, Proxy
from faults.runs import Line, OnS3, seconds_to_resume
from safetensors.torch import load_file
from support import program
from tiny_run import NO_SCAN, TINY

from pipeline import storage
from pipeline.run.state import open_run
from pipeline.settings.config import load_config

pytestmark = pytest.mark.faults

EVERY = 20  # steps between checkpoints
SETTINGS = [
    NO_SCAN, "prune.dense_control=false", "prune.rounds=1", "dense.epochs=2", "retrain.epochs=12",
    f"retrain.checkpoint_steps={EVERY}",
]  # fmt: skip
WAITS = {"SECATEUR_STORAGE_BACKOFF_S": "0.1"}
LEASE_S = 10


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that a run on a disk ends with."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "runs_dir": str(root / "runs")}))
    done = program("pipeline", "run", str(config), *SETTINGS, ray=False)
    assert done.returncode == 0, done.stderr
    return load_file(root / "runs/tiny/final/model.safetensors")


@pytest.fixture
def proxy(moto: str) -> Iterator[Proxy]:
    """Between S3 and the run that something happens to."""
    made = Proxy(moto)
    yield made
    made.close()


def fence(run: OnS3) -> int:
    return int(storage.read_json(f"{run.url}/lease.json")["fence"])


def written(proxy: Proxy, since: int) -> list[tuple[str, str]]:
    """What the store carried out after so many requests, and changes the run: a log is its writer's own.

    A heartbeat may still be tried, and is refused by the store: the lease is of another version.
    """
    changes = [(method, path) for method, path in proxy.carried_out[since:] if method not in ("GET", "HEAD")]
    return [(method, path) for method, path in changes if "/log/" not in path]


def only_error(run: OnS3) -> str:
    """The one message that a run ended with."""
    lines = run.output.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert lines[-1] == errors[0], run.output
    assert "Traceback" not in run.output, run.output
    return errors[0]


def check_same(run: OnS3, undisturbed: dict[str, torch.Tensor]) -> None:
    found = run.weights()
    assert found.keys() == undisturbed.keys()
    assert all(torch.equal(found[name], undisturbed[name]) for name in found)


def test_a_put_that_would_land_after_a_take_over(
    s3: str, moto: str, proxy: Proxy, tiny_yaml: Path, undisturbed: dict[str, torch.Tensor], line: Line
) -> None:
    """Its first tries are refused; meanwhile the lease ends, and another process, this one, takes the run."""
    first = OnS3(tiny_yaml, s3, proxy.url, "tiny", *SETTINGS, SECATEUR_STORAGE_RETRIES="1000", **WAITS)
    first.wait(first.has_a_checkpoint, poll=0.02)
    proxy.fault = Fault("refuse", times=-1, method="PUT", path="/rounds/")
    first.wait(lambda: proxy.made >= 3, poll=0.02)
    lease = f"{first.url}/lease.json"
    storage.write_json(lease, {**storage.read_json(lease), "released": True})
    with open_run(load_config(tiny_yaml, [*SETTINGS, f"runs_dir={s3}/runs"])) as taken:
        assert taken.fence == 2
        time.sleep(0.5)  # a try that was allowed before is over
        since, proxy.fault = len(proxy.carried_out), None
        first.finish(2)
        assert f"was taken over by process {os.getpid()} on " in only_error(first)
        assert written(proxy, since) == []
    second = OnS3(tiny_yaml, s3, moto, "tiny", *SETTINGS, **WAITS)
    second.finish()
    check_same(second, undisturbed)
    line("a PUT that lands after take-over", "identical", f"<={EVERY}", seconds_to_resume(second.output))


def test_a_driver_that_is_stopped_past_its_lease_and_let_go_on(
    s3: str, moto: str, proxy: Proxy, tiny_yaml: Path, undisturbed: dict[str, torch.Tensor], line: Line
) -> None:
    settings = [*SETTINGS, f"cluster.lease_seconds={LEASE_S}"]
    first = OnS3(tiny_yaml, s3, proxy.url, "tiny", *settings, **WAITS)
    first.wait(first.has_a_checkpoint, poll=0.02)
    os.kill(first.process.pid, signal.SIGSTOP)
    time.sleep(LEASE_S + 2)  # S3 tells times in whole seconds
    since = len(proxy.carried_out)
    second = OnS3(tiny_yaml, s3, moto, "tiny", *settings, **WAITS)
    try:
        second.wait(lambda: fence(second) == 2, poll=0.02)
        os.kill(first.process.pid, signal.SIGCONT)
        first.finish(75)
        said = only_error(first)
        assert "its lease was not renewed for " in said
        assert f"longer than cluster.lease_seconds={LEASE_S}" in said
        assert written(proxy, since) == []
        second.finish()
    finally:
        first.kill()
        second.kill()
    check_same(second, undisturbed)
    lost = LEASE_S + 2 + seconds_to_resume(second.output)
    line("driver stopped (SIGSTOP) past its lease and let go on", "identical", f"<={EVERY}", lost)


def test_conditional_headers_that_are_stripped_on_the_way(
    s3: str, proxy: Proxy, tiny_yaml: Path, undisturbed: dict[str, torch.Tensor], line: Line
) -> None:
    proxy.fault = Fault("strip", times=-1, method="")
    run = OnS3(tiny_yaml, s3, proxy.url, "tiny", *SETTINGS, **WAITS)
    seconds = run.finish(2)
    assert f"runs_dir={s3}/runs: its store, or something on the way there, ignores If-None-Match" in only_error(run)
    assert storage.list_folders(s3) == []
    proxy.fault = None
    again = OnS3(tiny_yaml, s3, proxy.url, "tiny", *SETTINGS, **WAITS)
    again.finish()
    check_same(again, undisturbed)
    line("conditional headers stripped", "stops cleanly", 0, seconds)


def test_credentials_that_expire_for_good(
    s3: str, proxy: Proxy, tiny_yaml: Path, undisturbed: dict[str, torch.Tensor], line: Line
) -> None:
    run = OnS3(tiny_yaml, s3, proxy.url, "tiny", *SETTINGS, SECATEUR_STORAGE_RETRIES="4", **WAITS)
    run.wait(run.has_a_checkpoint, poll=0.02)
    proxy.fault, since = Fault("refuse", times=-1, method="", status=400, code="ExpiredToken"), time.monotonic()
    run.finish(75)
    seconds = time.monotonic() - since
    said = only_error(run)
    assert "had no good credentials in 5 tries, the last ended with ExpiredToken" in said or "ended with 400" in said
    assert "see why they are not renewed" in said
    assert "run the same command again" in said
    proxy.fault = None
    again = OnS3(tiny_yaml, s3, proxy.url, "tiny", *SETTINGS, **WAITS)
    again.finish()
    assert "rounds/01: resumed at step" in again.output
    check_same(again, undisturbed)
    line("credentials expiring", "stops cleanly", f"<={EVERY}", seconds)
