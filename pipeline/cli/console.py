"""Tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.cli.messages import make_console
from pipeline.export.bench import Bench, Foreseen
from pipeline.network.groups import INPUTS, OUTPUTS, Groups
from pipeline.results import outcome
from pipeline.results.tables import TextTable
from pipeline.rounds.outlook import RunPlan
from pipeline.run.records import Scan
from pipeline.run.result import Result


def show_plan(plan: RunPlan, resolved: str, console: Console | None = None) -> None:
    """Print a plan: the resolved config (YAML text), every tensor, every round."""
    console = console or make_console()
    console.print(f"\n{resolved.rstrip()}", markup=False)
    counts = plan.counts
    console.print(
        f"\ndata: {counts.train:,} train, {counts.val:,} val, {counts.test:,} test samples, {counts.classes} classes"
    )
    console.print(_tensor_table(plan))
    if plan.groups is not None:
        console.print(_group_table(plan.groups, plan.kept_units))
    if plan.left_out:
        table = Table("left out", "shape", "reason", title="tensors that stay dense")
        for tensor in plan.left_out:
            table.add_row(tensor.name, "x".join(map(str, tensor.shape)), tensor.reason)
        console.print(table)
    total = sum(tensor.weights for tensor in plan.prunable)
    table = Table(title=f"rounds (dense training before them: {plan.dense_steps:,} steps)")
    predicted = any(row.rise is not None for row in plan.rounds)
    for title in ("round", "density", "weights kept", "compression", "FLOPs, by weights", "bytes", "steps"):
        table.add_column(title, justify="right")
    if predicted:
        table.add_column("predicted rise of the loss", justify="right")
    for row in plan.rounds:
        cells = (f"{row.density:.3%}", f"{row.kept:,}", f"{total / row.kept:.2f}x", f"{row.flops:,}", f"{row.bytes:,}")
        rise = [] if not predicted else ["-" if row.rise is None else f"{row.rise:.4f}"]
        table.add_row(str(row.round), *cells, f"{row.steps:,}", *rise)
    console.print(table)


def _tensor_table(plan: RunPlan) -> Table:
    table = Table(title="prunable tensors")
    for title, side in (("tensor", "left"), ("kind", "left"), ("shape", "left")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for title in ("weights", "FLOPs", "planned density", "planned weights"):
        table.add_column(title, justify="right")
    for tensor in plan.prunable:
        density = plan.densities.get(tensor.name)
        table.add_row(
            ", ".join((tensor.name, *tensor.aliases)),
            tensor.kind,
            "x".join(map(str, tensor.shape)),
            f"{tensor.weights:,}",
            f"{plan.flops[tensor.name]:,}",
            "-" if density is None else f"{density:.2%}",
            "-" if density is None else f"{round(density * tensor.weights):,}",
        )
    total = sum(tensor.weights for tensor in plan.prunable)
    table.add_row("total", "", "", f"{total:,}", f"{sum(plan.flops.values()):,}", "", "", style="bold")
    return table


def _group_table(groups: Groups, kept: Mapping[str, int]) -> Table:
    """The groups of channels; `weights` are those that go with all but one of them, where the other groups stay."""
    table = Table(title="groups of channels: each is removed from all of these tensors at once")
    for title in ("group", "made by", "read by"):
        table.add_column(title, overflow="fold")
    for title in ("channels", "planned", "weights at stake"):
        table.add_column(title, justify="right")
    for name, group in groups.by_name.items():
        made, read = (
            ", ".join(member.tensor for member in group.members if member.axis == axis) for axis in (OUTPUTS, INPUTS)
        )
        table.add_row(name, made, read, f"{group.units:,}", str(kept.get(name, "-")), f"{groups.at_stake(name):,}")
    return table


def show_result(
    result: Result, report_path: str, margin: float, classes: int | None = None, console: Console | None = None
) -> None:
    """Print the result of a run as a table; `margin` and `classes` as for `outcome.summary_rows`."""
    console = console or make_console()
    table = Table(title=f"{result.name} ({result.network})", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for label, value in outcome.summary_rows(result, margin, classes):
        table.add_row(label, value)
    table.add_row("report", report_path)
    console.print(table)


def show_scan(scan: Scan, console: Console | None = None) -> None:
    """Print the accuracy of each tensor at each density, the samples it took, and the quality that follows."""
    console = console or make_console()
    what = "dense" if scan.after is None else f"after round {scan.after}"
    table = Table(title=f"val accuracy with one tensor pruned ({what} {scan.dense.top1:.2%})")
    grids = [[level.density for level in tensor.levels] for tensor in scan.tensors]
    same = all(grid == grids[0] for grid in grids)
    table.add_column("tensor")
    for title in [f"{density:.3g}%" for density in (100 * d for d in grids[0])] if same else ["density: accuracy"]:
        table.add_column(title, justify="right" if same else "left")
    for title in ("samples a level", "shared by", "quality"):
        table.add_column(title, justify="right")
    for tensor in scan.tensors:
        levels = tensor.levels
        cells = [f"{level.top1:.1%}" for level in levels]
        if not same:
            pairs = zip(levels, cells, strict=True)
            cells = ["  ".join(f"{100 * level.density:.3g}%: {cell}" for level, cell in pairs)]
        samples = sum(level.samples for level in levels) / len(levels)
        quality = "-" if tensor.of_channels else f"{tensor.quality:.3f}"
        table.add_row(tensor.name, *cells, f"{samples:,.0f}", tensor.method, quality)
    console.print(table)


def show_bench(found: Bench, console: Console | None = None) -> None:
    """Print latency and memory of each form of the network, and what they come to in words."""
    console = console or make_console()
    table = Table(title="median latency (10-90% of the passes)")
    for title, side in (("network", "left"), ("batch", "right"), ("ms", "right"), ("parameters", "right")):
        table.add_column(title, justify=side)  # type: ignore[arg-type]
    for row in found.rows:
        spread = f"{row.median_ms:.3f} ({row.p10_ms:.3f}-{row.p90_ms:.3f})"
        table.add_row(row.name, str(row.batch), spread, f"{row.parameter_bytes / 1000:,.0f} kB")
    for name, why in found.missing.items():
        table.add_row(name, "-", escape(f"none: {why}"), "-")
    console.print(table)
    removed = ", ".join(f"{layer} {count}" for layer, count in found.removed.items() if count)
    console.print(f"units removed from the compact network: {removed or 'none'}", markup=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    console.print(found.verdict, markup=False)
    if found.predicted is not None:
        console.print(_foreseen(found.predicted), markup=False)


def _foreseen(predicted: Foreseen) -> str:
    said = (
        f"by the run's latency table (of {predicted.device}, batch {predicted.batch}) the compact network takes "
        f"{predicted.compact_ms:.3g} ms where the dense one takes {predicted.dense_ms:.3g}"
    )
    if predicted.error is None:
        return f"{said}; that was not measured here: it needs the same device and batch"
    return f"{said}: {abs(predicted.error):.1%} {'more' if predicted.error > 0 else 'less'} than was measured here"


def show_tables(
    tables: Sequence[TextTable], said: Sequence[str], page: str | None = None, console: Console | None = None
) -> None:
    """Print tables, what they come to, and where the page with the figures is, if there is one."""
    console = console or make_console()
    for each in tables:
        table = Table(title=each.title, title_justify="left")
        for number, column in enumerate(each.columns):
            table.add_column(column, justify="right" if number else "left")
        for row in each.rows:
            table.add_row(*row)
        console.print(table)
    for line in said:
        console.print(line, markup=False)
    if page is not None:
        console.print(f"page: {page}", markup=False)
