"""Runs under Ray whose processes are found by rank, watched in the run's folder, and killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support import ROOT, alone_on_the_network, environment

WORKERS = 2
Line = Callable[..., None]  # the fixture `line`
# One round of heavy steps on real digits, with an evaluation of one image at a time: wide enough to be hit in.
SETTINGS = [
    "data.resize=56", "data.size=56", "model.kwargs.inputs=3136", "data.val_fraction=0.3", "data.eval_batch=1",
    "dense.epochs=20", "dense.checkpoint_steps=50", "prune.rounds=1", "retrain.epochs=40",
    "retrain.checkpoint_steps=50", f"cluster.workers={WORKERS}",
]  # fmt: skip


class RayRun:
    """`secateur run`, started at once; its output goes to a file. Ray is its own, unless `prefix` leads to another."""

    def __init__(
        self, config: Path, runs: Path, *overrides: str, prefix: list[str] | None = None, **extra: str
    ) -> None:
        self.folder = runs / "tiny"
        self.log = config.parent / f"log-{time.monotonic_ns()}.txt"
        self.ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets lie below; their paths must be short
        prefix = alone_on_the_network() if prefix is None else prefix
        command = [*prefix, sys.executable, "-m", "cluster", "run", str(config), f"runs_dir={runs}"]
        self.started = time.monotonic()
        with self.log.open("w") as stream:
            self.driver = subprocess.Popen(
                [*command, *SETTINGS, *overrides], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                env=environment(RAY_TMPDIR=self.ray_folder, **extra),
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def wait(self, ready: Callable[[], Any], seconds: float = 240) -> Any:
        """Poll until `ready` gives something true, and return it; the driver must live."""
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            assert self.driver.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.001)
        return found

    def finish(self, code: int = 0, seconds: float = 300) -> float:
        """Wait for its end, check its exit code, and return the seconds that it took."""
        try:
            found = self.driver.wait(seconds)
        finally:
            self.close()
        assert found == code, self.output
        return time.monotonic() - self.started

    def kill_driver(self) -> None:
        """SIGKILL the driver alone; Ray's own processes end when they notice."""
        self.driver.kill()
        self.close()

    def close(self) -> None:
        """End the driver, if it lives, and remove Ray's folder."""
        self.driver.kill()
        self.driver.wait(60)
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


def same_weights(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same weights, to the bit."""
    first, second = (load_file(run / "final/model.safetensors") for run in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
