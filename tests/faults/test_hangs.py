"""Ranks that hang, are slow, or lack memory, under torchrun: who it is, and what becomes of the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.runs import Line, Started, newest_step
from support import ROOT, free_port
from tiny_run import NO_SCAN

pytestmark = pytest.mark.faults
SECONDS = 8  # cluster.hang_seconds


@pytest.fixture
def started(tiny_yaml: Path) -> Iterator[list[Started]]:
    made: list[Started] = []
    yield made
    for each in made:
        each.process.terminate()  # torchrun ends its ranks then; killed, it would leave them
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(60)
        each.kill()


def torchrun(started: list[Started], config: Path, *overrides: str) -> Started:
    """Two ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command = [*launcher, "-m", "pipeline", "run", str(config), NO_SCAN, f"cluster.hang_seconds={SECONDS}", *overrides]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    run = Started(config.parent / f"log-{len(started)}.txt", command, OMP_NUM_THREADS="1", PYTHONPATH=path)
    started.append(run)
    return run


def rank_of(run: Started, rank: int) -> int:
    """The process id of a rank."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(run.process.pid)], capture_output=True, text=True, check=True
    )
    for pid in map(int, listed.stdout.split()):
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return pid
    raise AssertionError(run.output)


def errors(run: Started) -> list[str]:
    return [text for text in run.output.splitlines() if text.startswith("error: ")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named_and_the_run_goes_on_afterwards(
    rank: int, tiny_yaml: Path, started: list[Started], line: Line
) -> None:
    run = torchrun(started, tiny_yaml, "dense.epochs=4000")
    steps = tiny_yaml.parent / "runs/tiny/dense/steps"
    run.wait(lambda: newest_step(steps), poll=0.05)
    time.sleep(SECONDS / 2)  # two looks: the ranks have heard of each other
    victim = rank_of(run, rank)
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    run.wait(lambda: errors(run), seconds=SECONDS + 60, poll=0.05)
    found = time.monotonic() - stopped
    os.kill(victim, signal.SIGKILL)  # torchrun itself does so after half a minute
    run.finish(code=1)  # torchrun's own
    assert len(errors(run)) == 1, run.output
    assert f"rank {rank} on " in errors(run)[0]
    assert f"(process {victim})" in errors(run)[0]
    assert "gives no sign of life" in errors(run)[0]
    assert f"cluster.hang_seconds={SECONDS}" in errors(run)[0]
    saved = newest_step(steps)
    again = torchrun(started, tiny_yaml, "dense.epochs=4000")
    again.wait(lambda: f"dense: resumed at step {saved}" in again.output, poll=0.05)
    line(f"rank {rank} hangs", "stops cleanly", "<=10", found)


def test_a_rank_that_is_slow_is_waited_for(tiny_yaml: Path, started: list[Started], line: Line) -> None:
    """Its steps take a second longer, for longer than the limit; then it is as fast as the other."""
    switch = tiny_yaml.parent / "switch"
    run = torchrun(started, tiny_yaml, *moody(switch, "slow"), "dense.epochs=3")
    steps = tiny_yaml.parent / "runs/tiny/dense/steps"
    run.wait(lambda: newest_step(steps), poll=0.01)
    switch.touch()
    begun = time.monotonic()
    while time.monotonic() - begun < 1.5 * SECONDS and run.process.poll() is None:
        time.sleep(0.1)
    switch.unlink()
    run.finish()
    assert not errors(run)
    line("a straggler", "continues", 0, 1.5 * SECONDS)


def test_a_rank_out_of_memory_ends_the_run_with_the_setting(
    tiny_yaml: Path, started: list[Started], line: Line
) -> None:
    switch = tiny_yaml.parent / "switch"
    settings = [*moody(switch, "memory"), "dense.epochs=400"]
    run = torchrun(started, tiny_yaml, *settings)
    steps = tiny_yaml.parent / "runs/tiny/dense/steps"
    run.wait(lambda: newest_step(steps), poll=0.01)
    switch.touch()
    run.finish(code=1)
    told = [text for text in errors(run) if "not enough memory" in text]
    assert len(told) == 1, run.output
    assert "on rank 1: not enough memory: lower dense.batch_size=64" in told[0]
    assert "pipeline/" not in run.output.partition("torch/distributed/run.py")[0], run.output  # no traceback of ours
    switch.unlink()
    again = torchrun(started, tiny_yaml, *settings)
    again.wait(lambda: "dense: resumed at step" in again.output, poll=0.05)
    line("out of memory on one rank", "stops cleanly", "<=10")


def moody(switch: Path, mood: str) -> list[str]:
    """Settings of a network of `faults.moody`."""
    return ["model.factory=faults.moody:network", f"model.kwargs.switch={switch}", f"model.kwargs.mood={mood}"]
