"""Whole runs with shards and state only on S3: killed in a round and started again, they end with the same bits."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faults.runs import LONG, Line, Started, check_stopped, seconds_to_resume
from safetensors.torch import load, load_file
from support import (
    FETCH,
    MAKE_BUCKET,
    PREPARE,
    ROOT,
    S3_ENVIRONMENT,
    WATCH,
    alone_on_the_network,
    environment,
    free_port,
    program,
    start_moto,
)
from tiny_run import TINY

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.cli import commands as pipeline_commands
from pipeline.data import shards
from pipeline.local import LocalEngine
from pipeline.run.state import config_of
from pipeline.settings.config import parse_config
from pipeline.tracking import tracking
from pipeline.train.world import World

SETTINGS = ["prune.allocation=uniform", "data.source=shards", "retrain.epochs=12", "retrain.checkpoint_steps=20"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the tiny run on disk."""
    root = tmp_path_factory.mktemp("shards")
    loaded = parse_config({**TINY, "runs_dir": "runs"})
    shards.build(loaded.data.model_copy(update={"shard_samples": 200}), 0, str(root))
    return root


@pytest.fixture(scope="module")
def reference(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of an undisturbed run on local disks."""
    runs = tmp_path_factory.mktemp("runs")
    path = runs / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "runs_dir": str(runs)}))
    pipeline_commands.run(
        pipeline_commands.load(path, [*SETTINGS, f"data.root={stored}"]), LocalEngine(World(0, 1, torch.device("cpu")))
    )
    return load_file(runs / "tiny/final/model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def killed_in_a_round(command: list[str], watch: list[str], env: dict[str, str]) -> None:
    """Start a run and SIGKILL its driver when round 1 has a checkpoint."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        subprocess.run(watch, cwd=ROOT, env=env, check=True, timeout=LONG)
        assert process.poll() is None, process.communicate()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)


@pytest.mark.faults
def test_a_run_without_ray_goes_on_after_sigkill_with_the_same_bits(
    s3: str,
    tiny_yaml: Path,
    stored: Path,
    reference: dict[str, torch.Tensor],
    tmp_path: Path,
    secateur: Callable[..., str],
    line: Line,
) -> None:
    assert "10 shards uploaded, 0 were there" in secateur("shards", "push", str(stored), f"{s3}/shards")
    run = f"{s3}/runs/tiny"
    command = ["pipeline", "run", str(tiny_yaml), *SETTINGS, f"runs_dir={s3}/runs", f"data.root={s3}/shards"]
    command.append(f"data.cache_dir={tmp_path / 'cache'}")
    killed_in_a_round([sys.executable, "-m", *command], [sys.executable, "-c", WATCH, run], environment())
    assert not storage.exists(f"{run}/rounds/01/metrics.json")
    again = program(*command, ray=False)
    assert again.returncode == 0, again.stderr
    assert "rounds/01: resumed at step" in again.stdout
    assert f"{run}/report.html" in again.stdout
    assert same(load(storage.read_bytes(f"{run}/final/model.safetensors")), reference)
    assert list((tmp_path / "cache").glob("*.tar"))
    assert storage.list_folders(f"{run}/rounds/01") == ["checkpoint"]
    assert "weights are those of the run's dense network" in secateur("plan", f"{run}/config.yaml")
    with pytest.raises(UserError, match=r"tracking\.uri is not set"):
        tracking.sync(run, config_of(run))
    line("SIGKILL of a run on S3, without Ray", "identical", "<=20", seconds_to_resume(again.stdout))


class Inside:
    """A network of its own with moto's server in it; programs run beside it."""

    def __init__(self) -> None:
        prefix = alone_on_the_network()
        port = free_port()
        self.server = start_moto(port, prefix)
        self.prefix = ["nsenter", f"--net=/proc/{self.server.pid}/ns/net"] if prefix else []
        self.env = environment(
            **{**S3_ENVIRONMENT, "SECATEUR_STORAGE_BACKOFF_S": "2"}, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}"
        )

    def command(self, *args: str) -> list[str]:
        return [*self.prefix, sys.executable, *args]

    def run(self, *args: str) -> Any:
        return subprocess.run(
            self.command(*args), cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=LONG, check=False
        )


@pytest.fixture
def inside() -> Iterator[Inside]:
    made = Inside()
    yield made
    made.server.kill()
    made.server.wait()


@pytest.mark.ray
@pytest.mark.faults
def test_a_run_under_ray_goes_on_after_sigkill_with_the_same_bits(
    inside: Inside, tiny_yaml: Path, stored: Path, reference: dict[str, torch.Tensor], tmp_path: Path, line: Line
) -> None:
    prepared = inside.run("-c", PREPARE, str(stored))
    assert prepared.returncode == 0, prepared.stderr
    run = "s3://store/runs/tiny"
    command = [
        "-m",
        "cluster",
        "run",
        str(tiny_yaml),
        *SETTINGS,
        "runs_dir=s3://store/runs",
        "data.root=s3://store/shards",
    ]
    killed_in_a_round(inside.command(*command), inside.command("-c", WATCH, run), inside.env)
    again = inside.run(*command)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "rounds/01: resumed at step" in again.stdout
    names = ["final/model.safetensors", "lease.json"]
    assert inside.run("-c", FETCH, run, str(tmp_path), *names).returncode == 0
    assert same(load_file(tmp_path / "final-model.safetensors"), reference)
    assert json.loads((tmp_path / "lease.json").read_text())["fence"] == 2
    line("SIGKILL of the driver of a run on S3", "identical", "<=20", seconds_to_resume(again.stdout))


# Says how many levels a scan has written.
COUNT = (
    "import sys; from pipeline import storage\n"
    "folders = [f'{sys.argv[1]}/{name}' for name in storage.list_folders(sys.argv[1])]\n"
    "files = [f'{folder}/{name}' for folder in folders for name in storage.list_files(folder)]\n"
    "print(sum(storage.read_bytes(file).count(b'\"level\"') for file in files))\n"
)


@pytest.mark.ray
@pytest.mark.faults
def test_a_run_under_ray_that_sigterm_ends_in_the_scan_gives_its_lease_back(
    inside: Inside, tiny_yaml: Path, tmp_path: Path, line: Line
) -> None:
    made = inside.run("-c", MAKE_BUCKET)
    assert made.returncode == 0, made.stderr
    levels = [round(1 - number / 101, 4) for number in range(1, 101)]
    changes = ["runs_dir=s3://store/runs", "dense.epochs=1", f"scan.levels=[{','.join(map(str, levels))}]"]
    command = inside.command("-m", "cluster", "run", str(tiny_yaml), *changes)
    run = Started(tmp_path / "log.txt", command, **inside.env)
    try:
        run.wait(lambda: " scan: 1/" in run.output)
        since = time.monotonic()
        os.kill(run.process.pid, signal.SIGTERM)
        run.finish(130)
    finally:
        run.kill()
    took = time.monotonic() - since
    check_stopped(run.output, f"secateur run {shlex.join([str(tiny_yaml), *changes])}")
    fetched = inside.run("-c", FETCH, "s3://store/runs/tiny", str(tmp_path), "lease.json")
    assert fetched.returncode == 0, fetched.stderr
    found = inside.run("-c", COUNT, "s3://store/runs/tiny/scan/levels")
    assert 0 < int(found.stdout) < 300, found.stdout + found.stderr
    assert json.loads((tmp_path / "lease.json").read_text())["released"]
    line("SIGTERM of a run on S3 in scan", "stops cleanly", 0, took)
