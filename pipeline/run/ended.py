"""How a run's driver ended, where it did not come to the run's end: for whoever looks at the run later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pipeline.base.errors import one_line
from pipeline.base.hiding import hide
from pipeline.run.records import Ended
from pipeline.run.state import Run, now_ms

FILE = "ended.json"


@contextmanager
def noted(run: Run) -> Iterator[None]:
    """Write ended.json if the block ends by an error, and remove what an earlier driver wrote."""
    if run.has(FILE):
        run.remove(FILE)
    try:
        yield
    except BaseException as error:
        how: Literal["killed", "failed"] = "killed" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
        why = hide(one_line(f"{type(error).__name__}: {error}".removesuffix(": ")))
        with contextlib.suppress(Exception):  # the error itself is the one to be told
            run.commit(Ended(how, why, now_ms()), FILE)
        raise
