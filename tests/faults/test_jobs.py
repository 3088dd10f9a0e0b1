"""Jobs on a real head: two submissions at once, a job that is cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.runs import EVERY, LONG, SETTINGS, newest_step, resumed_at, same_weights
from head import DASHBOARD, Head
from support import ROOT, hearing_ctrl_c, program
from tiny_run import LONG_ROUND

from pipeline.run import state
from pipeline.settings.config import Config, load_config

pytestmark = [pytest.mark.ray, pytest.mark.faults]
CONFIG = "configs/demo.yaml"
ADDRESS = f"--address={DASHBOARD}"


def submit_command(*settings: str) -> list[str]:
    return [sys.executable, "-m", "cluster", "submit", CONFIG, *settings, ADDRESS]


def wait_until(ready: Callable[[], object], log: Callable[[], str], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, log()
        time.sleep(0.1)


def test_a_live_run_is_not_started_twice_and_a_cancelled_one_is_kept_and_resumes(
    head: Head, tmp_path: Path, line: Callable[..., None]
) -> None:
    runs = tmp_path / "runs"
    # A round that lasts beyond all that is tried while it goes on.
    slow = ["retrain.epochs=160", "prune.dense_control=false", "scan.samples=50", "scan.levels=[0.5,0.1]"]
    common = [*SETTINGS, f"runs_dir={runs}", "dense.epochs=5", *slow]
    undisturbed = program("cluster", "run", CONFIG, *common, "name=undisturbed", "tracking.enabled=false",
                          timeout=LONG)  # fmt: skip
    assert undisturbed.returncode == 0, undisturbed.stderr

    mine = [*common, "name=job"]
    first = head.run(*submit_command(*mine, "--no-wait"))
    assert first.returncode == 0, first.stdout + first.stderr
    job = first.stdout.split()[1]

    def log() -> str:
        return str(head.run("ray", "job", "logs", ADDRESS, job).stdout)

    steps = runs / "job/rounds/01/steps"
    wait_until(lambda: newest_step(steps), log)

    # Another way to start it meets the lease; the same way follows the job that is at it.
    twin = head.run("ray", "job", "submit", ADDRESS, "--working-dir", ".", "--",
                    "python", "-m", "cluster", "run", CONFIG, *mine)  # fmt: skip
    assert twin.returncode != 0
    assert f"run '{runs}/job' is being written by process" in twin.stdout + twin.stderr
    inside = ["nsenter", f"--net=/proc/{head.process.pid}/ns/net"]
    with (tmp_path / "follower.txt").open("w+") as said:
        follower = subprocess.Popen(
            [*inside, *hearing_ctrl_c(submit_command(*mine))], cwd=ROOT, env=head.env, stdout=said, stderr=said
        )
        try:
            wait_until(lambda: "dense: epoch 5/5" in (tmp_path / "follower.txt").read_text(), log)
            follower.send_signal(signal.SIGINT)
            assert follower.wait(LONG) == 130
        finally:
            follower.kill()
        said.seek(0)
        text = said.read()
    assert f"is being carried out by job {job}: following it" in text
    assert f"no longer following job {job}, which goes on" in text
    assert "Traceback" not in text
    assert "RUNNING" in head.run("ray", "job", "status", ADDRESS, job).stdout, text
    line("two submissions at once", "stops cleanly", 0)

    before = time.monotonic()
    stopped = head.run("ray", "job", "stop", ADDRESS, job)
    assert "was stopped" in stopped.stdout + stopped.stderr
    took = time.monotonic() - before
    assert "stopped; what is finished is kept." in log()
    assert "Traceback" not in log(), log()
    assert not (runs / "job/result.json").exists()
    wait_until(lambda: not head.processes("RayTrainWorker") and not head.processes("-m cluster run"), log)
    with state.open_run(config_of(runs)):  # the lease was given back
        pass
    saved = newest_step(steps)
    again = head.run(*submit_command(*mine))
    assert again.returncode == 0, again.stdout + again.stderr
    assert saved is not None
    assert resumed_at(again.stdout) >= saved > 0
    assert same_weights(runs / "undisturbed", runs / "job")
    line("job cancelled", "identical", f"<={EVERY}", took)


@pytest.mark.timeout(1800)
def test_a_job_whose_driver_is_killed_fails_and_goes_on_when_submitted_again(
    head: Head, tmp_path: Path, line: Callable[..., None]
) -> None:
    runs = tmp_path / "runs"
    small = ["dense.epochs=4", *LONG_ROUND]
    job = ["ray", "job", "submit", ADDRESS, "--working-dir", ".", "--", "python", "-m", "cluster", "run", CONFIG]

    absolute = [f"runs_dir={runs}", "tracking.enabled=false", *small]
    undisturbed = program("pipeline", "run", CONFIG, "name=undisturbed", *absolute, ray=False)
    assert undisturbed.returncode == 0, undisturbed.stderr

    submitted = head.run(*job[:4], "--submission-id=first", "--no-wait", *job[4:], "name=job", *absolute)
    assert submitted.returncode == 0, submitted.stderr
    deadline = time.monotonic() + 600
    while not list((runs / "job").glob("rounds/01/steps/*/manifest.json")):
        assert time.monotonic() < deadline, head.run("ray", "job", "logs", ADDRESS, "first").stdout
        time.sleep(0.05)
    pid = json.loads((runs / "job/lease.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    while "FAILED" not in head.run("ray", "job", "status", ADDRESS, "first").stdout.upper():
        assert time.monotonic() < deadline + 60
        time.sleep(1)

    again = head.run(*job, "name=job", *absolute)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed at step" in again.stdout
    assert "compression" in again.stdout
    assert same_weights(runs / "undisturbed", runs / "job")
    line("driver of a job killed", "identical", "<=50")


def config_of(runs: Path) -> Config:
    return load_config(runs / "job/config.yaml")
