"""SIGTERM in this process: what it does when, and what it leaves alone."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from pipeline.cli.sigterm import answered, as_ctrl_c


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


def test_ctrl_c_is_answered_before_the_main_thread_deals_with_it() -> None:
    """Within a handler the main thread deals with no other signal; the answer comes from another thread."""
    said: list[str] = []
    came = threading.Event()

    def say() -> None:
        said.append(threading.current_thread().name)
        came.set()

    before = signal.set_wakeup_fd(-1)
    handler = signal.signal(signal.SIGINT, lambda *_: said.append(f"handled, answered: {came.wait(20)}"))
    try:
        with answered(say):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert said[0] == "ctrl-c"
        assert said[1:] == ["handled, answered: True"] * 2  # it is said once
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(before)
