"""Losses under Ray: they count since the last checkpoint only, and what would repeat is not tried again."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from faults.runs import Line, RayRun, copy_before_rounds, newest_step, resumed_at, same_weights
from support import ROOT, program
from tiny_run import NO_SCAN, TINY

pytestmark = [pytest.mark.ray, pytest.mark.faults]
ONE_STAGE = [NO_SCAN, "prune.dense_control=false"]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    config: Path
    run: Path
    seconds: float  # of its rounds, with all that Ray takes to start


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "runs_dir": str(root / "runs")}))
    RayRun(config, root / "runs", *ONE_STAGE).finish()
    run = root / "runs/tiny"
    seconds = RayRun(config, copy_before_rounds(run, root / "again"), *ONE_STAGE).finish()
    return Undisturbed(config, run, seconds)


def begun(undisturbed: Undisturbed, runs: Path, *overrides: str) -> RayRun:
    """A run that begins with its rounds."""
    return RayRun(undisturbed.config, copy_before_rounds(undisturbed.run, runs), *ONE_STAGE, *overrides)


def test_four_kills_each_after_progress_do_not_end_a_run(undisturbed: Undisturbed, tmp_path: Path, line: Line) -> None:
    """cluster.max_failures=1, and rank 1 is killed four times, each time after a new checkpoint."""
    run = begun(undisturbed, tmp_path, "cluster.max_failures=1")
    steps, killed, last = run.folder / "rounds/01/steps", 0, 0
    for kill in range(4):
        # A worker that Ray has started anew, after a checkpoint that is newer than the one before.
        victim = run.wait(lambda: (pid := run.worker(1)) != killed and pid, poll=0.05)  # noqa: B023
        run.wait(lambda: (newest_step(steps) or 0) > last)  # noqa: B023
        last = newest_step(steps) or 0
        killed = victim
        os.kill(victim, signal.SIGKILL)
        run.wait(lambda: run.output.count("trying again") == kill + 1, poll=0.05)  # noqa: B023
    seconds = run.finish()
    assert same_weights(undisturbed.run, run.folder)
    assert run.output.count("(1 of 1)") == 4, run.output
    assert "with process id" in run.output
    assert resumed_at(run.output) >= last
    assert "Worker exit type" not in run.output  # Ray's own paragraph
    line("four kills, each after progress", "identical", "<=200", seconds - undisturbed.seconds)


def test_a_rank_that_hangs_under_ray_is_named_and_replaced(
    undisturbed: Undisturbed, tmp_path: Path, line: Line
) -> None:
    run = begun(undisturbed, tmp_path, "cluster.hang_seconds=8")
    victim = run.worker(1)
    run.wait(lambda: newest_step(run.folder / "rounds/01/steps"))
    os.kill(victim, signal.SIGSTOP)
    seconds = run.finish()
    assert f"rounds: rank 1 on {os.uname().nodename} (process {victim})" in run.output, run.output
    assert "cluster.hang_seconds=8" in run.output
    assert "trying again from the last checkpoint (1 of 3)" in run.output
    assert same_weights(undisturbed.run, run.folder)
    line("a rank hangs under Ray", "identical", "<=50", seconds - undisturbed.seconds)


def test_a_rank_out_of_memory_under_ray_is_not_tried_again(tiny_yaml: Path, tmp_path: Path, line: Line) -> None:
    switch = tmp_path / "switch"
    switch.touch()
    moody = ["model.factory=faults.moody:network", f"model.kwargs.switch={switch}", "model.kwargs.mood=memory"]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = program("cluster", "run", str(tiny_yaml), NO_SCAN, "cluster.workers=2", *moody, timeout=800, PYTHONPATH=path)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "not enough memory: lower dense.batch_size=64" in errors[0]
    assert "trying again" not in done.stdout
    assert "Traceback" not in done.stderr
    line("out of memory on one rank under Ray", "stops cleanly", 0)


def test_what_rays_memory_monitor_kills_is_named(tiny_yaml: Path, line: Line) -> None:
    """A threshold of memory that is always passed, so that the monitor kills a worker as soon as it looks."""
    tight = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "200"}
    done = program("cluster", "run", str(tiny_yaml), NO_SCAN, "cluster.max_failures=1", timeout=800, **tight)
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Ray's memory monitor killed its process" in errors[0]
    assert "GB" in errors[0]
    assert "tried again" in errors[0]  # how often, or not at all
    assert "To mend it, give each worker more room" in errors[0]
    assert "Traceback" not in done.stderr
    line("Ray's memory monitor", "stops cleanly", 0)
