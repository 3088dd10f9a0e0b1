"""The note on a run that MLflow shows first: what came of it, a table, pictures, and the command to repeat it."""

from __future__ import annotations

from pipeline.results import outcome, worth
from pipeline.results.tables import TextTable
from pipeline.results.words import NOT_MEASURED, percent
from pipeline.run.contents import Contents
from pipeline.run.result import Result
from pipeline.run.state import run_root

_FENCE = "```"


def of_run(run: Contents) -> str:
    """The note, in Markdown. `{run_id}` in it stands for the MLflow run.

    The folder in it is that in which the run was made, so a copy of it elsewhere changes nothing.
    """
    again = f"To repeat it:\n\n{_FENCE}\n{outcome.repeat_command(run, run_root(run.config))}\n{_FENCE}"
    if run.result is None:
        return f"{_so_far(run)}\n\n{again}\n"
    told = outcome.verdict(run.result, run.config.target.margin)
    parts = [f"**{outcome.sentence(run.result)}**", f"{told.title}. {told.text}", _table(run.result).markdown()]
    if run.dense is not None and worth.rounds(run.finished_rounds):
        parts.append(_picture("rounds", "Accuracy against compression"))
    parts.append(_picture("layers", "Weights kept in each layer"))
    return "\n\n".join([*parts, again]) + "\n"


def _so_far(run: Contents) -> str:
    rounds = [metrics for metrics in run.finished_rounds if metrics.accepted]
    network = run.config.model.factory
    if run.ended is not None:
        return f"{network}: stopped after {len(rounds)} rounds ({run.ended.why}). The same command goes on from there."
    return f"{network}: under way; rounds done: {len(rounds)}. What came of it will stand here."


def _table(result: Result) -> TextTable:
    test = result.test
    rows = [
        [name, percent(1 - scores.top1) if scores else NOT_MEASURED, share]
        for name, scores, share in (
            ("dense", test.dense, "100%"),
            ("dense, trained as long", test.dense_control, "100%"),
            ("pruned", test.pruned, percent(result.density)),
        )
    ]
    return TextTable(f"On {test.samples:,} test images", ["network", "error", "weights kept"], rows)


def _picture(name: str, label: str) -> str:
    return f"![{label}](get-artifact?path=figures%2F{name}.png&run_uuid={{run_id}})"
