"""What the machines of a run are busy with, as a journal in RUN/machines: a line a machine every EVERY_S.

A thread reads it on the driver's machine, and one on each further machine that has workers. MLflow's system metrics are
made from the journal. Whatever goes wrong with it, the run goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.base import machine
from pipeline.base.environment import number
from pipeline.run import journal
from pipeline.run.events import Busy
from pipeline.run.journal import Kept
from pipeline.run.state import Run, now_ms

FOLDER = "machines"
EVERY_S = 30.0


@contextmanager
def kept(run: Run, tell: Callable[[str], None]) -> Iterator[Kept]:
    """The journal of a run's machines while the block lasts. Raises nothing of its own."""
    with journal.kept(run, FOLDER, "what the machines are busy with", tell) as book:
        yield book


@contextmanager
def watched(progress: Callable[[Busy], None], wanted: bool = True) -> Iterator[None]:
    """Tell `progress` what this machine is busy with while the block lasts, from a thread; not where it is not wanted.

    The first time is after a third of EVERY_S, so that short runs have some, too.
    """
    if not wanted:
        yield
        return
    every, ended = number("SECATEUR_MACHINE_SECONDS", EVERY_S), threading.Event()

    def work() -> None:
        meter, parts = machine.Meter(), machine.parts()
        wait = every / 3
        while not ended.wait(wait):
            progress(Busy(machine.node(), now_ms(), parts, meter.read()))
            wait = every

    thread = threading.Thread(target=work, name="machine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(machine.PATIENCE_S)


def read(root: str) -> tuple[Busy, ...]:
    """The lines of the run in a folder, in their order; none where it is older than the journal, or has none."""
    return tuple(journal.read(Run(root, 0), Busy, FOLDER))
