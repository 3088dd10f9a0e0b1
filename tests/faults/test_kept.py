"""The faults that every `make test` makes, too."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.runs import Line, Started, newest_step, resumed_at, same_weights, seconds_to_resume
from support import ROOT, alone_on_the_network, environment, program
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


@pytest.mark.ray
def test_a_scan_goes_on_when_a_trial_is_lost(tiny_yaml: Path, line: Line) -> None:
    runs = tiny_yaml.parent / "runs"
    racing = ["dense.epochs=1", "scan.mode=adaptive", "scan.levels=[0.5,0.2,0.02]", "scan.interval=0.1"]
    command = [*alone_on_the_network(), sys.executable, "-m", "cluster", "scan", str(tiny_yaml), "name=lost", *racing]
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        kill_a_trial(process)
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors + output
    seconds = time.monotonic() - started
    started = time.monotonic()
    alone = program("cluster", "scan", str(tiny_yaml), "name=alone", *racing)
    assert alone.returncode == 0, alone.stderr + alone.stdout
    lost = seconds - (time.monotonic() - started)
    scans = [json.loads((runs / name / "scan/scan.json").read_text()) for name in ("lost", "alone")]
    assert scans[0] == scans[1]
    line("SIGKILL of a trial of the scan", "identical", 0, lost)


def kill_a_trial(driver: subprocess.Popen[str], seconds: float = 240) -> None:
    """SIGKILL a process of the driver's own cluster that measures a tensor."""
    deadline = time.monotonic() + seconds
    while True:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "no trial came"
        listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
        rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
        ours, count = {driver.pid}, 0
        while count != (count := len(ours)):
            ours |= {int(pid) for pid, parent, *_ in rows if int(parent) in ours}
        trials = [int(pid) for pid, _, *command in rows if int(pid) in ours and "ScanTrial" in "".join(command)]
        if trials:
            os.kill(trials[0], signal.SIGKILL)
            return
        time.sleep(0.05)
