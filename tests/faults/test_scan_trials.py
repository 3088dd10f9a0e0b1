"""A trial that dies under the scan: it goes on, and finds what a scan that lost none finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.runs import Line
from support import ROOT, alone_on_the_network, environment, program

pytestmark = [pytest.mark.ray, pytest.mark.faults]


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
