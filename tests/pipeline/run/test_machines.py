"""The journal of a run's machines: a thread tells, the driver writes, a reader finds the lines in their order."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.base import machine
from pipeline.run import machines
from pipeline.run.events import Busy
from pipeline.run.state import Run


def test_a_thread_tells_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_MACHINE_SECONDS", "0.06")
    told: list[Busy] = []
    twice = threading.Event()

    def hear(busy: Busy) -> None:
        told.append(busy)
        if len(told) == 2:
            twice.set()

    with machines.watched(hear):
        assert twice.wait(60)
    count = len(told)
    assert not [thread for thread in threading.enumerate() if thread.name == "machine"]
    assert {busy.node for busy in told} == {machine.node()}
    assert told[0].ms <= told[1].ms
    assert "cpu_utilization_percentage" in told[1].values
    assert len(told) == count


def test_nobody_is_told_where_it_is_not_wanted() -> None:
    with machines.watched(lambda busy: pytest.fail("told"), wanted=False):
        assert not [thread for thread in threading.enumerate() if thread.name == "machine"]


def test_lines_are_read_in_their_order(tmp_path: Path) -> None:
    lines = [Busy(node, ms, "2 × c", {"cpu_utilization_percentage": 50.0}) for node, ms in (("a", 5), ("b", 4))]
    problems: list[str] = []
    for fence, line in enumerate(lines, start=1):
        (tmp_path / "lease.json").write_text(f'{{"fence": {fence}}}')
        with machines.kept(Run(str(tmp_path), fence), problems.append) as book:
            book.add(line)
    assert machines.read(str(tmp_path)) == tuple(lines)
    assert problems == []
    assert machines.read(str(tmp_path / "older")) == ()
