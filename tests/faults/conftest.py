"""`make faults` ends with a table: a line for each fault that was made, with what was promised and what it cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.ray_nodes import Nodes

COLUMNS = ("fault", "class", "steps repeated", "seconds lost")
PROMISES = ("identical", "continues", "stops cleanly")


LIMIT_S = 1800  # of a test that names none: several whole runs, each of which has a limit of its own
STARTED = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT_S))


def pytest_runtest_setup() -> None:
    """Begin no further fault test once SECATEUR_FAULT_MINUTES are over, where they are given."""
    minutes = os.environ.get("SECATEUR_FAULT_MINUTES")
    if minutes and time.monotonic() - STARTED > 60 * float(minutes):
        pytest.skip(f"the {minutes} minutes for fault tests are over")


@pytest.fixture
def line(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Adds a line to the table, once the test has checked what it says.

    `promise` is one of PROMISES. identical: the final weights are those of an undisturbed run, to the bit; continues:
    the same sample order, accuracy within noise; stops cleanly: one message, state kept, resumes when mended.
    `repeated` counts updates made twice, or says at most how many ("<=50"); `lost` is the seconds beyond the
    undisturbed run, or until the run resumed; None where it has no meaning.
    """

    def add(fault: str, promise: str, repeated: int | str | None = None, lost: float | None = None) -> None:
        assert promise in PROMISES, promise
        record_property("line", [fault, promise, repeated, lost])

    return add


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """A Ray cluster without nodes, to which a test adds some."""
    made = Nodes(tmp_path)
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "line":
                    fault, promise, repeated, lost = value
                    seconds = "-" if lost is None else f"{max(0.0, lost):.1f}"
                    verdict = promise if outcome == "passed" else f"{promise}: FAILED"
                    rows.append((fault, verdict, "-" if repeated is None else str(repeated), seconds))
    if not rows:
        return
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    terminalreporter.section("faults")
    for row in [COLUMNS, *rows]:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    terminalreporter.write_line(f"{len(rows)} lines")
