"""Runs that are watched in their folder, and killed: under Ray with processes found by rank, or with state on S3."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file
from support import ROOT, alone_on_the_network, environment

from pipeline import storage

WORKERS = 2
EVERY = 50  # steps between checkpoints
LONG = 900.0  # seconds after which a run hangs for certain, on a busy machine too
Line = Callable[..., None]  # the fixture `line`
# One round of heavy steps on real digits: workers whose driver was killed go on for two seconds, and do not finish it.
# Each rank has a batch to evaluate.
SETTINGS = [
    "data.resize=56", "data.size=56", "model.kwargs.inputs=3136", "dense.epochs=10", f"dense.checkpoint_steps={EVERY}",
    "data.eval_batch=50", "prune.rounds=1", "retrain.epochs=25", f"retrain.checkpoint_steps={EVERY}",
    f"cluster.workers={WORKERS}",
]  # fmt: skip


class Started:
    """A command, started at once; its output goes to a file."""

    def __init__(self, log: Path, command: list[str], cwd: Path = ROOT, **extra: str) -> None:
        self.log, self.started = log, time.monotonic()
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, cwd=cwd, stdout=stream, stderr=subprocess.STDOUT, env=environment(**extra)
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def wait(self, ready: Callable[[], Any], seconds: float = LONG, poll: float = 0.001) -> Any:
        """Poll until `ready` gives something true, and return it; the process must live."""
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(poll)
        return found

    def finish(self, code: int = 0, seconds: float = LONG) -> float:
        """Wait for its end, check its exit code, and return the seconds that it took."""
        try:
            found = self.process.wait(seconds)
        finally:
            self.kill()
        assert found == code, self.output
        return time.monotonic() - self.started

    def stop(self) -> None:
        """SIGTERM, and a second one while it ends."""
        os.kill(self.process.pid, signal.SIGTERM)
        time.sleep(0.3)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL it, if it lives."""
        self.process.kill()
        self.process.wait(60)


class RayRun(Started):
    """`secateur run` under Ray; killed, it is the driver alone that dies, and Ray's own processes end on noticing.

    Ray is its own, in a network of its own, unless `prefix` leads to another.
    """

    def __init__(
        self, config: Path, runs: Path, *overrides: str, prefix: list[str] | None = None, **extra: str
    ) -> None:
        self.folder = runs / "tiny"
        self.ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets lie below; their paths must be short
        prefix = alone_on_the_network() if prefix is None else prefix
        command = [*prefix, sys.executable, "-m", "cluster", "run", str(config), f"runs_dir={runs}"]
        log = config.parent / f"log-{time.monotonic_ns()}.txt"
        super().__init__(log, [*command, *SETTINGS, *overrides], RAY_TMPDIR=self.ray_folder, **extra)

    def kill(self) -> None:
        super().kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def worker(self, rank: int, stage: str = "rounds") -> int:
        """The process id of a rank of a stage, from Ray Train's own log; waits until it has started."""

        def find() -> int | None:
            newest = (0, 0)
            for file in Path(self.ray_folder).glob("ray/session_2*/logs/train/ray-train-sys-worker-*.log"):
                for line in file.read_text().splitlines():
                    entry = json.loads(line)
                    if entry.get("world_rank") == rank and f"-{stage}-" in entry.get("run_name", ""):
                        newest = max(newest, (entry["timestamp_ns"], entry["process"]))
            return newest[1] or None

        return int(self.wait(find))

    def kill_in_a_checkpoint(self, rank: int, folder: str = "rounds/01/steps") -> int:
        """SIGKILL a rank while rank 0 is writing a step checkpoint; the step of that checkpoint."""
        writer, steps = self.worker(0), self.folder / folder
        victim = self.worker(rank)
        while True:
            torn = self.wait(lambda: unfinished(steps))
            os.kill(writer, signal.SIGSTOP)
            if not (torn / "manifest.json").exists() and torn.exists():
                os.kill(victim, signal.SIGKILL)
                if victim != writer:
                    os.kill(writer, signal.SIGCONT)
                return int(torn.name)
            os.kill(writer, signal.SIGCONT)


class OnS3(Started):
    """A run without Ray whose state is on S3, which it reaches at `endpoint`."""

    def __init__(self, config: Path, bucket: str, endpoint: str, name: str, *overrides: str, **extra: str) -> None:
        self.url = f"{bucket}/runs/{name}"
        where = [f"runs_dir={bucket}/runs", f"name={name}"]
        command = [sys.executable, "-m", "pipeline", "run", str(config), *overrides, *where]
        log = config.parent / f"{name}-{time.monotonic_ns()}.txt"
        super().__init__(log, command, AWS_ENDPOINT_URL=endpoint, **extra)

    def has_a_checkpoint(self) -> bool:
        """Whether round 1 has a whole step checkpoint."""
        steps = f"{self.url}/rounds/01/steps"
        return any(storage.exists(f"{steps}/{name}/manifest.json") for name in storage.list_folders(steps))

    def weights(self) -> dict[str, torch.Tensor]:
        """What it ended with."""
        return load(storage.read_bytes(f"{self.url}/final/model.safetensors"))


def unfinished(steps: Path) -> Path | None:
    """A step checkpoint of which there is more than its folder, but no manifest yet."""
    with contextlib.suppress(FileNotFoundError):  # the run removes old ones meanwhile
        for entry in os.scandir(steps):
            names = os.listdir(entry.path)
            if names and "manifest.json" not in names:
                return Path(entry.path)
    return None


def newest_step(steps: Path) -> int | None:
    """The step of the newest whole step checkpoint."""
    found = [int(path.parent.name) for path in steps.glob("*/manifest.json")]
    return max(found) if found else None


def resumed_at(output: str, phase: str = "rounds/01") -> int:
    """The step at which the last resumption of a phase began; 0 where it began anew."""
    lines = [line for line in output.splitlines() if f"{phase}: resumed at step" in line]
    return int(lines[-1].split("resumed at step ")[1].split()[0]) if lines else 0


def seconds_to_resume(output: str, phase: str = "rounds/01") -> float:
    """How long after the first line of its log a program resumed a phase, by the times that the lines say."""
    lines = output.splitlines()
    [text] = [text for text in lines if f"{phase}: resumed at step" in text]
    first = next(line for line in lines if re.match(r"\d\d:\d\d:\d\d ", line))
    began, then = (datetime.strptime(line[:8], "%H:%M:%S") for line in (first, text))
    return (then - began).total_seconds() % 86400


def copy_before_rounds(run: Path, runs: Path) -> Path:
    """A folder of runs in which `run` has everything but its rounds and what came after them."""
    later = shutil.ignore_patterns("rounds", "final", "result.json", "report.html", "test_looks.jsonl")
    shutil.copytree(run, runs / "tiny", ignore=later)
    return runs


def same_weights(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same weights, to the bit."""
    first, second = (load_file(run / "final/model.safetensors") for run in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def check_stopped(output: str, command: str) -> None:
    """Check what a run that SIGTERM ended says: that its state is kept and how it goes on, and nothing of Ray's."""
    assert "stopped; what is finished is kept." in output, output
    assert f"To go on: {command}" in output, output
    for word in ("Traceback", "SIGTERM received", "Fatal Python error"):
        assert word not in output, output
