"""What a person sees: progress on a terminal or in a job's log, tables, and one message for an error."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import assert_never

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.base.hiding import hide
from pipeline.cli.messages import make_console
from pipeline.export.bench import Bench, Foreseen
from pipeline.network.groups import INPUTS, OUTPUTS, Groups
from pipeline.results import outcome
from pipeline.results.tables import TextTable
from pipeline.rounds.outlook import RunPlan
from pipeline.run.events import (
    EpochEnded,
    Event,
    LevelMeasured,
    Mirrored,
    Noted,
    Paced,
    Resumed,
    RoundBegun,
    Saved,
    ShardsCounted,
    StageBegun,
    Stepped,
    TogetherMeasured,
    Warned,
    WorkersBegun,
)
from pipeline.run.records import Epoch, Scan
from pipeline.run.result import Result

LOG_EVERY_S = 2.0  # a log gets at most one line of a running count in so many seconds
STEPS_EVERY_S = 30.0  # and one of a training's steps, between the lines of its epochs


def pace(epoch: Epoch) -> str:
    """How fast an epoch went, and which part of its time its steps waited for data."""
    if epoch.images_per_s is None or epoch.waiting is None:
        return ""
    return f", {epoch.images_per_s:,.0f} images/s, {epoch.waiting:.0%} of it waiting for data"


class Display:
    """Shows a run's events: bars on a terminal, plain lines in a log."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.started = time.monotonic()
        self.last_line = 0.0
        self.bars: Progress | None = None
        self.task: tuple[str, TaskID] | None = None

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bars = Progress(*columns, console=self.console, transient=True)
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Warned(text):
                self.line(f"warning: {text}")
            case Noted(text):
                self.line(text)
            case StageBegun(title=title, skipped=skipped):
                self.line(f"{title}: {'finished before, skipped' if skipped else 'started'}")
            case ShardsCounted(text, done, total):
                self.count(f"shards: {text}", done, total)
            case LevelMeasured(done=done, total=total):
                self.count("scan", done, total)
                if self.bars is None and done == total:
                    self.line(f"scan: {done} levels measured")
            case TogetherMeasured(density, rise, power):
                self.line(
                    f"scan: all tensors together at density {density:.2%}: the loss rises by at least {rise:.4f} "
                    f"(damages composed by the power {power:g})"
                )
            case RoundBegun():
                self.round(event)
            case Resumed(phase, step, steps, workers):
                where = f" on {workers} workers" if workers > 1 else ""
                self.line(f"{phase}: resumed at step {step} of {steps}{where}")
            case Stepped(phase, step, steps):
                self.count(phase, step, steps, every=STEPS_EVERY_S)
            case EpochEnded(phase, epoch, epochs, steps):
                if self.bars is not None:
                    self.count(phase, epoch.step, steps)
                self.line(
                    f"{phase}: epoch {epoch.epoch}/{epochs}, loss {epoch.loss:.4f}, val {epoch.val_top1:.2%}, "
                    f"{epoch.seconds:.1f} s{pace(epoch)}"
                )
            case Paced() | Saved() | WorkersBegun() | Mirrored():
                pass  # for the log and for gauges
            case _:
                assert_never(event)

    def round(self, event: RoundBegun) -> None:
        """A round is pruned, and its retraining begins."""
        self.line(
            f"{event.phase}: {event.kept:,} weights {'kept in the end' if event.gradual else 'kept'} "
            f"({event.density:.2%}), val {event.before:.2%}"
            + (f", {event.dead:,} of dead neurons gone" if event.dead else "")
            + "".join(f", {path} drops {rate:.3g}" for path, rate in event.dropout.items() if rate)
        )

    def count(self, text: str, done: int, total: int, every: float = LOG_EVERY_S) -> None:
        """A running count: a bar, or now and then a line."""
        if self.bars is not None:
            if self.task is None or self.task[0] != text:
                if self.task is not None:
                    self.bars.remove_task(self.task[1])
                self.task = (text, self.bars.add_task(text, total=total))
            self.bars.update(self.task[1], completed=done, total=total)
        elif done == total or time.monotonic() - self.last_line >= every:
            self.line(f"{text}: {done}/{total}")

    def line(self, text: str) -> None:
        """One line, with the seconds since the start."""
        self.last_line = time.monotonic()
        self.console.print(f"[{self.last_line - self.started:7.1f} s] {hide(text)}", markup=False)


def show_plan(plan: RunPlan, resolved: str, console: Console | None = None) -> None:
    """Print a plan: the resolved config (YAML text), every tensor, every round."""
    console = console or make_console()
    console.print(resolved.rstrip(), markup=False)
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
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


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


def show_result(result: Result, report_path: str, console: Console | None = None) -> None:
    """Print the result of a run as a table."""
    console = console or make_console()
    table = Table("", "", title=f"{result.name} ({result.network})", show_header=False)
    for label, value in outcome.summary_rows(result):
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
