"""SIGTERM in this process: what it does when, and what it leaves alone."""

from __future__ import annotations

import signal
import sys

import pytest

from pipeline.cli.sigterm import as_ctrl_c


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_it_interrupts_and_later_ones_leave_the_end_alone() -> None:
    before, done = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        try:
            terminate()
        finally:
            terminate()
            done.append("within finally")

    def program() -> None:
        try:
            work()
        except KeyboardInterrupt:
            try:
                raise FileNotFoundError
            except FileNotFoundError:
                terminate()
                done.append("within another exception")
            raise SystemExit(130) from None
        finally:
            terminate()
            done.append("within an exit")

    with pytest.raises(SystemExit), as_ctrl_c():
        program()
    assert done == ["within finally", "within another exception", "within an exit"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_after_one_that_got_lost_the_next_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a destructor raises, Python drops."""
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda given: dropped.append(given.exc_type))

    class Deaf:
        def __del__(self) -> None:
            terminate()

    with as_ctrl_c():
        Deaf()
        assert dropped == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            terminate()


def test_what_handles_ctrl_c_is_asked_first_and_only_once() -> None:
    asked = []

    def ask(*_: object) -> None:
        asked.append(1)
        terminate()  # a second one, while the first is being dealt with

    before = signal.signal(signal.SIGINT, ask)
    try:
        with as_ctrl_c(), pytest.raises(KeyboardInterrupt):
            terminate()
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [1]


def test_where_ctrl_c_is_ignored_it_still_interrupts() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with as_ctrl_c(), pytest.raises(KeyboardInterrupt):
            terminate()
    finally:
        signal.signal(signal.SIGINT, before)
