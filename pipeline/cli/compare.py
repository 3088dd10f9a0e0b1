"""`secateur compare`: finished runs side by side."""

from __future__ import annotations

import json
from typing import Any

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.cli.console import show_tables
from pipeline.results import figures
from pipeline.results.tables import TextTable, percent
from pipeline.results.words import number, size, span
from pipeline.run.result import Result
from pipeline.run.state import Run

COLUMNS = ("run", "network", "compression", "FLOPs left", "dense error", "error", "drop (95%)", "verdict", "packed")


def show(run_dirs: list[str], figure: str | None, as_json: bool) -> None:
    """Print a table of finished runs, and draw their errors against compression into `figure`, .svg or .png.

    Raises UserError for a run that is not finished.
    """
    figures.require_name(figure, "--figure")
    results = [load(run_dir) for run_dir in run_dirs]
    if as_json:
        print(json.dumps([facts(path, each) for path, each in zip(run_dirs, results, strict=True)], indent=1))
    else:
        show_tables([table(results)], notes(results))
    if figure is not None:
        from pipeline.results import plots

        figures.write(plots.compared(results), figure, "Error on val against compression, a line a run", "--figure")


def load(run_dir: str) -> Result:
    """The result of a finished run. Raises UserError where it has none."""
    run = Run(run_dir, 0)
    if not run.has("result.json"):
        raise UserError(
            f"run '{run_dir}' has no result.json: it is not finished, or no run; `secateur status` says more"
        )
    return run.load(Result, "result.json")


def table(results: list[Result]) -> TextTable:
    """A row a run, the smallest network first."""
    return TextTable("finished runs", COLUMNS, [_cells(each) for each in sorted(results, key=lambda r: r.weights_kept)])


def notes(results: list[Result]) -> list[str]:
    """What makes runs hard to compare."""
    said = []
    if len({each.test.samples for each in results}) > 1:
        said.append("these runs were tested on different numbers of images: their data differ")
    if len({each.weights_total for each in results}) > 1:
        said.append("these runs are of networks of different sizes: compression counts from each one's own")
    return said


def facts(run_dir: str, result: Result) -> dict[str, Any]:
    """A run for scripts: fractions, as in result.json."""
    return {
        "path": storage.join(run_dir),
        "name": result.name,
        "network": result.network,
        "seed": result.seed,
        "compression": result.compression,
        "flops_density": result.flops_density_weights,
        "dense_error": 1 - result.test.reference.top1,
        "error": 1 - result.test.pruned.top1,
        "drop_ci95": list(result.test.mcnemar.drop_ci95),
        "verdict": result.verdict,
        "packed_bytes": result.bytes.packed,
    }


def _cells(result: Result) -> list[str]:
    return [
        result.name,
        result.network,
        f"{number(result.compression)}×",
        percent(result.flops_density_weights),
        percent(1 - result.test.reference.top1, 2),
        percent(1 - result.test.pruned.top1, 2),
        span(*result.test.mcnemar.drop_ci95),
        result.verdict,
        size(result.bytes.packed),
    ]
