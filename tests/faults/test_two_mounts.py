"""One `runs_dir` that two hosts mount, as NFS is: two mounts of one folder, with locks that reach the other or do not.

The kernels that tests run on often have no NFS, so bindfs (FUSE) stands in. Without `--enable-lock-forwarding` each
mount has locks of its own, as NFS mounted with `nolock` and Lustre with `localflock` have.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from faults.gated import FACTORY, Gate
from faults.runs import Line, Started, same_weights
from support import program
from tiny_run import NO_SCAN, TINY

pytestmark = [pytest.mark.faults, pytest.mark.slow]
SETTINGS = [
    NO_SCAN, "prune.dense_control=false", "prune.rounds=1", "dense.epochs=2", "retrain.epochs=10",
    "retrain.checkpoint_steps=20", f"model.factory={FACTORY}",
]  # fmt: skip
Mounts = Callable[..., tuple[Path, Path]]


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    """Makes two mounts of one folder, given options of bindfs."""
    if shutil.which("bindfs") is None:
        pytest.skip("bindfs is not here, which stands in for NFS: apt-get install bindfs")
    (tmp_path / "server").mkdir()
    with ExitStack() as stack:

        def make(*options: str) -> tuple[Path, Path]:
            made = (tmp_path / "host-a", tmp_path / "host-b")
            for folder in made:
                folder.mkdir()
                command = ["bindfs", *options, str(tmp_path / "server"), str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"mounting is not allowed here: {done.stderr}")
                stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return made

        yield make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk."""
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "runs_dir": str(root / "runs")}))
    done = program("pipeline", "run", str(config), *SETTINGS, ray=False)
    assert done.returncode == 0, done.stderr
    return root / "runs/tiny"


def start(config: Path, runs: Path, **extra: str) -> Started:
    command = [sys.executable, "-m", "pipeline", "run", str(config), *SETTINGS, f"runs_dir={runs}"]
    return Started(config.parent / f"log-{time.monotonic_ns()}.txt", command, **extra)


def held_in_a_round(config: Path, runs: Path, gate: Gate) -> Started:
    """A run that stands still in its round, at a gate."""
    gate.close("train", runs, "tiny/rounds/01/steps/*/manifest.json")
    run = start(config, runs, **gate.environment)
    run.wait(gate.held, poll=0.02)
    return run


def test_locks_that_reach_the_other_mount(
    tiny_yaml: Path, tmp_path: Path, mounts: Mounts, undisturbed: Path, line: Line
) -> None:
    one, other = mounts("--enable-lock-forwarding", "--multithreaded")
    first = held_in_a_round(tiny_yaml, one, Gate(tmp_path / "gate"))
    try:
        second = start(tiny_yaml, other)
        second.finish(2)
        assert f"run '{other / 'tiny'}' is being written by process {first.process.pid} on " in second.output
    finally:
        first.kill()
    third = start(tiny_yaml, other)
    seconds = third.finish()
    assert "rounds/01: resumed at step" in third.output
    assert same_weights(undisturbed, other / "tiny")
    line("two mounts (NFS), locks shared: a second driver, and SIGKILL of the first", "identical", "<=20", seconds)


def test_locks_that_do_not_reach_the_other_mount(
    tiny_yaml: Path, tmp_path: Path, mounts: Mounts, undisturbed: Path, line: Line
) -> None:
    one, other = mounts()
    gate = Gate(tmp_path / "gate")
    first = held_in_a_round(tiny_yaml, one, gate)
    try:
        second = start(tiny_yaml, other)
        try:
            lease = other / "tiny/lease.json"
            second.wait(lambda: json.loads(lease.read_text())["fence"] == 2, poll=0.02)
            gate.open()
            first.finish(2)
            assert f"run '{one / 'tiny'}' was taken over by process {second.process.pid} on " in first.output
            assert "Traceback" not in first.output
            seconds = second.finish()
        finally:
            second.kill()
    finally:
        first.kill()
    assert same_weights(undisturbed, other / "tiny")
    line("two mounts (NFS), locks not shared: a second driver takes over", "identical", "<=20", seconds)
