"""A full disk, which every `make test` makes too, and a driver of one worker that is killed under Ray."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.runs import Line, Started, newest_step, resumed_at, same_weights, seconds_to_resume
from support import alone_on_the_network, program
from tiny_run import LONG_ROUND


def test_a_full_disk_is_one_message_and_the_run_goes_on_when_there_is_room(
    tiny_yaml: Path, tmp_path: Path, line: Line
) -> None:
    """A real small file system; the dense checkpoint does not fit."""
    started = time.monotonic()
    undisturbed = program("pipeline", "run", str(tiny_yaml), ray=False)
    seconds = time.monotonic() - started
    assert undisturbed.returncode == 0, undisturbed.stderr
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    started = time.monotonic()
    try:
        full = program("pipeline", "run", str(tiny_yaml), f"runs_dir={disk}", ray=False)
        assert full.returncode == 2, full.stdout + full.stderr
        errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, full.stderr
        assert str(disk) in errors[0]
        assert "free space" in errors[0]
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        again = program("pipeline", "run", str(tiny_yaml), f"runs_dir={disk}", ray=False)
        assert again.returncode == 0, again.stderr
        assert same_weights(tiny_yaml.parent / "runs/tiny", disk / "tiny")
        lost = time.monotonic() - started - seconds
        steps = json.loads((disk / "tiny/dense/metrics.json").read_text())["history"][-1]["step"]
        line("disk full", "stops cleanly", f"<={steps - resumed_at(again.stdout, 'dense')}", lost)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.ray
@pytest.mark.faults
def test_a_driver_killed_in_a_round_goes_on_and_ends_with_the_same_bits(tiny_yaml: Path, line: Line) -> None:
    runs = tiny_yaml.parent / "runs"
    undisturbed = program("pipeline", "run", str(tiny_yaml), "name=undisturbed", *LONG_ROUND, ray=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    command = [*alone_on_the_network(), sys.executable, "-m", "cluster", "run", str(tiny_yaml), "name=killed"]
    killed = Started(tiny_yaml.parent / "log.txt", [*command, *LONG_ROUND])
    try:
        killed.wait(lambda: newest_step(runs / "killed/rounds/01/steps"))
    finally:
        killed.kill()
    assert not (runs / "killed/rounds/01/metrics.json").exists()
    again = program("cluster", "run", str(tiny_yaml), "name=killed", *LONG_ROUND)
    assert again.returncode == 0, again.stderr + again.stdout
    assert "rounds/01: resumed at step" in again.stdout
    assert same_weights(runs / "undisturbed", runs / "killed")
    results = [json.loads((runs / name / "result.json").read_text()) for name in ("killed", "undisturbed")]
    assert results[0]["test"] == results[1]["test"]
    line("SIGKILL of the driver of one worker", "identical", "<=50", seconds_to_resume(again.stdout))
