"""SIGTERM, which a cancelled job gets: it ends a run as Ctrl-C does."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def as_ctrl_c() -> Iterator[None]:
    """While the block lasts, SIGTERM does what Ctrl-C does; only the main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _Handler())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class _Handler:
    """Raises KeyboardInterrupt, once whatever else handles Ctrl-C at this time (Ray, in a training) has been asked.

    While an earlier interruption is being dealt with it does nothing: what is to be put in order then is not disturbed.
    """

    def __init__(self) -> None:
        self._asking = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._asking or _ending():
            return
        self._asking = True
        try:
            ctrl_c = signal.getsignal(signal.SIGINT)
            if callable(ctrl_c):
                ctrl_c(signal.SIGINT, frame)
        finally:
            self._asking = False
        raise KeyboardInterrupt


def _ending() -> bool:
    """Whether this thread is within the `except` or `finally` of an interruption, or of an exit."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return True
        error = error.__context__
    return False
