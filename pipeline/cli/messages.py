"""One message for an error, and the exit code that goes with it. Loads nothing heavy: every command begins here."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.base.errors import Away, Lost, RunStopped, UserError
from pipeline.base.hiding import hide
from pipeline.base.process import MIRROR_THREAD
from pipeline.cli import sigterm

if TYPE_CHECKING:  # loaded where something is printed with it: help is not
    from rich.console import Console

MISTAKE = 2  # exit code: the user can mend it, and trying again without that would end the same way
PASSING = 75  # exit code (EX_TEMPFAIL of sysexits.h): something was away or lost, and the same command may work later
INTERRUPTED = 130  # exit code of a program that Ctrl-C ended
LOG_WIDTH = 180  # columns of a table in a log


def make_console(stderr: bool = False) -> Console:
    """A console that writes whole lines: in a log, which has no width, tables are as wide as they need."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, soft_wrap=True, width=LOG_WIDTH)


class Told(SystemExit):
    """An end of which the user has been told in other words."""


@contextmanager
def one_message(resume: str | None = None) -> Iterator[None]:
    """One message, and the exit code: MISTAKE for what the user can mend, or a run that had to stop; PASSING for what
    may work later; INTERRUPTED for Ctrl-C and SIGTERM.
    """

    def say(text: str) -> None:
        make_console(stderr=True).print(hide(text), markup=False)

    with sigterm.as_ctrl_c(), sigterm.answered(lambda: say("Ctrl-C: stopping, which may take some seconds")):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
                yield
        except (UserError, RunStopped) as error:
            say(f"error: {error}")
            raise SystemExit(PASSING if isinstance(error, Away | Lost) else MISTAKE) from error
        except (MemoryError, RuntimeError) as error:
            from pipeline.train import memory

            if not memory.lacks(error):
                raise
            say(f"error: {memory.said(error)}")
            raise SystemExit(MISTAKE) from error
        except (KeyboardInterrupt, SystemExit) as error:
            if isinstance(error, Told) or (isinstance(error, SystemExit) and error.code != INTERRUPTED):
                raise  # Typer makes INTERRUPTED of Ctrl-C
            say("stopped; what is finished is kept.")
            if resume:
                say(f"To go on: {resume}")
            raise SystemExit(INTERRUPTED) from error


def typed(program: str) -> str:
    """The command as it was typed, for a message that says how to go on."""
    return f"{program} {shlex.join(sys.argv[1:])}"


def leave(command_line: Callable[[], None]) -> NoReturn:
    """Run a command line and end the process with its exit code.

    A thread that still waits for MLflow would abort the interpreter's own end (it is within C++ then), so the process
    leaves without it.
    """
    code: Any = 0
    try:
        command_line()
    except SystemExit as error:
        code = error.code or 0
    if code == INTERRUPTED:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one more would only change the exit code
    if any(thread.name == MIRROR_THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    raise SystemExit(code)
