"""Processes by id and start."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from pipeline.base import process


def test_a_process_lives_while_its_id_is_of_the_same_start() -> None:
    start = process.started(os.getpid())
    assert start is not None
    assert process.lives(os.getpid(), start)
    assert process.lives(os.getpid(), None)
    assert not process.lives(os.getpid(), start - 1)  # the id is of another process now


def test_the_start_is_in_ticks_since_the_boot() -> None:
    before = process.since_boot()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        start = process.started(child.pid)
        assert start is not None
        assert before - 1 <= start / os.sysconf("SC_CLK_TCK") <= process.since_boot() + 1
        assert process.lives(child.pid, start)
    finally:
        child.communicate(b"\n")
    assert not process.lives(child.pid, start)
    assert process.started(child.pid) is None


def test_a_command_s_name_may_look_like_the_fields_behind_it() -> None:
    """The kernel takes a thread's name for that of the command."""
    program = "from pathlib import Path; Path('/proc/self/comm').write_text(') S 1 (x'); print(); input()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        start = process.started(child.pid)
        assert start is not None
        assert abs(start / os.sysconf("SC_CLK_TCK") - process.since_boot()) < 60
    finally:
        child.communicate(b"\n")


def test_the_clock_goes_forward() -> None:
    first = process.since_boot()
    time.sleep(0.01)
    assert 0.01 <= process.since_boot() - first < 60
