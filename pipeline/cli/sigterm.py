"""SIGTERM, which a cancelled job gets, ends a run as Ctrl-C does; and Ctrl-C is answered at once."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
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


@contextmanager
def answered(say: Callable[[], None]) -> Iterator[None]:
    """While the block lasts, `say` is called from a thread as soon as Ctrl-C comes, the first time it does.

    Python itself deals with it only where the main thread comes out of what it does, and putting a run in order then
    takes seconds. Whoever handles Ctrl-C at this time (Ray, in a training) still does. Nothing is said in other threads
    than the main one, which alone has signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, came = socket.socketpair()
    came.setblocking(False)
    before = signal.set_wakeup_fd(came.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while number := heard.recv(1):
            if number[0] == signal.SIGINT:
                say()
                return

    thread = threading.Thread(target=listen, name="ctrl-c", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        came.close()
        thread.join(1.0)
        heard.close()


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
