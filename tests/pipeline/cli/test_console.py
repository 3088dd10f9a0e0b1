"""The tables that commands print."""

from __future__ import annotations

import io

from rich.console import Console

from pipeline.cli import console
from pipeline.export.bench import Bench
from pipeline.export.latency import Latency
from pipeline.run.result import LatencySummary


def test_a_form_that_is_missing_has_a_row_that_says_why() -> None:
    rows = tuple(Latency(name, 1, 2.0, 1.0, 3.0, 4000, 100) for name in ("dense", "pruned"))
    summary = LatencySummary(device="cpu", batch=1, dense=2.0, pruned=2.0, compact=None, verdict=None)
    text = io.StringIO()
    missing = {"CSR": "no [sparse] kernel"}
    console.show_bench(Bench(rows, "no faster", {}, {}, (), summary, missing), Console(file=text, width=200))
    [line] = [line for line in text.getvalue().splitlines() if "CSR" in line]
    assert "none: no [sparse] kernel" in line
