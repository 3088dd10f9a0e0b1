"""report.html: one file, readable anywhere, that says what a run found and how it was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import storage
from pipeline.base import stats
from pipeline.base.errors import UserError
from pipeline.results.words import (
    NOT_MEASURED,
    better,
    count,
    duration,
    moment,
    number,
    percent,
    points,
    short,
    size,
    span,
)
from pipeline.run.contents import Contents, read
from pipeline.run.records import LayerActivity, Scan
from pipeline.run.result import LatencySummary, OnTest, Result, Scores

if TYPE_CHECKING:  # matplotlib is loaded where a figure is drawn: it takes most of a second
    from matplotlib.figure import Figure


FEW_CLASSES = 10  # top-5 of so many classes is nearly always right


def write(run_dir: str | Path, check: storage.Check | None = None) -> str:
    """Write `report.html` into the run directory and return where it is.

    `check` is called before each try. Raises UserError if the run is not finished or a file of it is damaged.
    """
    target = storage.join(run_dir, "report.html")
    storage.write_bytes(target, render(run_dir).encode(), check)
    return target


def render(run_dir: str | Path) -> str:
    """The report as HTML text: one self-contained page without scripts; the same run gives the same text.

    Raises UserError if the run is not finished or a file of it is damaged.
    """
    run = read(run_dir)
    result = run.result
    if result is None:
        raise UserError(
            f"run '{run_dir}' has no result.json yet: it is not finished; the command that started it goes on"
        )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "short": short,
        "size": size,
        "duration": duration,
        "number": number,
        "moment": moment,
        "points": points,
    }
    return environment.get_template("report.html").render(
        run=run,
        result=result,
        verdict=verdict(result, run.config.target.margin),
        reference=reference_name(result),
        rows=summary_rows(result, run.config.target.margin, None if run.data is None else run.data.classes),
        rounds=run.finished_rounds,
        unpruned=unpruned(result),
        undone=not all(metrics.accepted for metrics in run.finished_rounds),
        predictions=predictions(run),
        totals=totals(result),
        measured=measured_on(run.activity),
        cuts=scan_rows(run.scan),
        plots=_plots(run, result),
        command=f"secateur run {storage.join(run.path, 'config.yaml')}",
        seconds=dict(result.seconds),
    )


def summary_rows(result: Result, margin: float, classes: int | None = None) -> list[tuple[str, str]]:
    """What a run found, as (label, value) for the terminal and the top of the report.

    `margin` is as for `verdict`. Of networks that tell few `classes` apart, the top-5 error says nothing.
    """
    test, stored, start = result.test, result.bytes, result.lineage
    low, high = test.mcnemar.drop_ci95
    return [
        *([("started from", f"round {start.round} of {start.run}")] if start else []),
        ("verdict", result.verdict),
        *([("why", undecided(result, margin))] if result.verdict == "undecided" and not test.guessing else []),
        ("compression", f"{number(result.compression)}×"),
        ("weights kept", f"{count(result.weights_kept)} of {count(result.weights_total)}"),
        ("FLOPs left, by weights", percent(result.flops_density_weights, 1)),
        ("FLOPs left, zero inputs skipped too", percent(result.flops_density, 1)),
        ("test error, dense", error(test.dense, test.samples, classes)),
        (
            "test error, dense control",
            error(test.dense_control, test.samples, classes) if test.dense_control else NOT_MEASURED,
        ),
        ("test error, pruned", error(test.pruned, test.samples, classes)),
        (f"against {reference_name(result)}", f"{better(drop(result))} (95% of the drop: {span(low, high)})"),
        *_against_given(test),
        ("size, dense fp32", size(stored.dense_fp32)),
        ("size, pruned and gzipped", _smaller(stored.dense_gzip, stored.dense_fp32)),
        ("size, packed", _smaller(stored.packed, stored.dense_fp32)),
        ("latency", _latency(result.latency_ms)),
        ("looks at test", str(result.test_looks)),
    ]


def _against_given(test: OnTest) -> list[tuple[str, str]]:
    """The drop against the dense network as it was given, where the verdict rests on the dense control."""
    if test.against_dense is None:
        return []
    lost, (low, high) = test.dense.top1 - test.pruned.top1, test.against_dense.drop_ci95
    return [("against the dense network as given", f"{better(lost)} (95% of the drop: {span(low, high)})")]


def drop(result: Result) -> float:
    """Top-1 on test that pruning cost, a fraction; negative where the pruned network is better."""
    return result.test.reference.top1 - result.test.pruned.top1


def reference_name(result: Result) -> str:
    """What the pruned network was judged against."""
    return "dense control" if result.test.dense_control else "dense"


@dataclass(frozen=True)
class Verdict:
    """The verdict in plain words, and what it rests on."""

    title: str
    text: str


def verdict(result: Result, margin: float) -> Verdict:
    """The verdict in plain words; `margin` is the drop that the run was asked to stay within, a fraction."""
    low, high = result.test.mcnemar.drop_ci95
    limit, interval = f"the margin of {points(margin, sign='')}", span(low, high)
    if result.test.guessing:
        share = percent(result.test.largest_class, 1)
        return Verdict(
            "The dense network guesses",
            f"It is right on {percent(result.test.dense.top1, 1)} of test, and always naming the largest class is "
            f"right on {share}: its 95% interval does not lie above that. So there was no accuracy that pruning could "
            "lose. Check model.checkpoint, data.mean and data.std, the order of the classes, or train for longer.",
        )
    if unpruned(result):
        return Verdict(
            "Nothing was pruned",
            "No round was accepted: each one lost more on val than target.tolerance, down to the smallest step. The "
            "network handed over is the dense one as it was.",
        )
    if result.verdict == "no loss":
        text = f"Even the upper end of the drop's 95% interval ({interval}) is within {limit}."
        if low > 0:
            text += " The interval lies above zero: there is a drop, small enough to be within what was allowed."
        return Verdict("No loss of accuracy", text)
    if result.verdict == "loss":
        text = f"The drop's 95% interval ({interval}) lies wholly above zero: the pruned network is less accurate."
        return Verdict("Accuracy was lost", text)
    return Verdict(
        "Undecided",
        f"The drop's 95% interval ({interval}) holds zero but reaches past {limit}: the test neither shows a loss "
        f"nor rules one out that matters. {more_images(result, margin)}",
    )


def undecided(result: Result, margin: float) -> str:
    """Why a verdict is undecided, and what would decide it, in a line."""
    low, high = result.test.mcnemar.drop_ci95
    may = f"the drop may be {points(low)} or {points(high)}, and {points(margin, sign='')} matter"
    return f"{may}. {more_images(result, margin)}"


def more_images(result: Result, margin: float) -> str:
    """About how many more test images would decide."""
    paired, samples = result.test.mcnemar, result.test.samples
    wanted = stats.deciding(paired.only_dense_right, paired.only_pruned_right, samples, margin)
    if wanted is None:
        return "No number of test images that could be had would decide: less pruning, or another margin, would."
    return (
        f"About {count(round_up(wanted - samples))} more test images that go like these {count(samples)} would decide."
    )


def round_up(value: int) -> int:
    """A number of images to two digits, upwards: 1234 as 1300."""
    step = 10 ** max(0, len(str(value)) - 2)
    return -(-value // step) * step


def unpruned(result: Result) -> bool:
    """Whether a campaign ended with the dense network: nothing is pruned, and no round was accepted."""
    return result.weights_kept == result.weights_total and not any(row.accepted for row in result.rounds)


@dataclass(frozen=True)
class Rise:
    """The rise of the loss before a round's retraining (nats on val): predicted, the least predicted, and measured."""

    predicted: float
    least: float
    measured: float


def predictions(run: Contents) -> dict[int, Rise]:
    """Predicted and measured rises, by round. Gradual pruning has no moment before the retraining."""
    found: dict[int, Rise] = {}
    if run.config.prune.gradual or run.dense is None:
        return found
    for each in run.rounds:
        said = each.plan.predicted if each.plan is not None else None
        if said is not None and each.metrics is not None:
            measured = each.metrics.val_before_retrain.loss - run.dense.val.loss
            found[each.number] = Rise(said.rise, said.least, measured)
    return found


@dataclass(frozen=True)
class Totals:
    """The layer table's last row; shares are fractions, `bits` those of the packed file for each kept weight."""

    weights: int
    flops: int | None
    density: float
    flops_density: float | None
    bits: float | None


def totals(result: Result) -> Totals:
    """The layer table's last row. Act% has none: layers' outputs differ in number, which result.json does not hold."""
    flops = [layer.flops for layer in result.layers if layer.flops is not None]
    packed, kept = result.bytes.packed, result.weights_kept
    return Totals(
        weights=result.weights_total,
        flops=sum(flops) if flops and len(flops) == len(result.layers) else None,
        density=result.density,
        flops_density=result.flops_density,
        bits=None if packed is None or not kept else 8 * packed / kept,
    )


def measured_on(activity: Iterable[LayerActivity]) -> dict[str, list[str]]:
    """Which tensor Act% was measured on -> names of the layers."""
    found: dict[str, list[str]] = {}
    for row in activity:
        found.setdefault(row.measured, []).append(row.name)
    return found


@dataclass(frozen=True)
class Cut:
    """The scan's results for a tensor; `within` is the smallest density tried whose drop stays within delta, if any."""

    name: str
    weights: int
    sigma: float
    quality: float
    threshold: float
    within: float | None


def scan_rows(scan: Scan | None) -> list[Cut]:
    """A row for each of the scan's tensors."""
    if scan is None:
        return []
    floor = scan.dense.top1 - scan.delta
    rows = []
    for tensor in scan.tensors:
        within: float | None = None
        for level in sorted(tensor.levels, key=lambda level: -level.density):
            if level.top1 < floor:
                break
            within = level.density
        threshold = tensor.quality * tensor.sigma
        rows.append(Cut(tensor.name, tensor.weights, tensor.sigma, tensor.quality, threshold, within))
    return rows


@dataclass(frozen=True)
class Plots:
    """SVG elements, `histograms` by tensor; None where the run does not hold what they show."""

    layers: Markup
    sensitivity: Markup | None
    sensitivity_loss: Markup | None
    rounds: Markup | None
    training: Markup | None
    histograms: dict[str, Markup]


def _plots(run: Contents, result: Result) -> Plots:
    from pipeline.results import plots

    scan, dense, rounds, network = run.scan, run.dense, run.finished_rounds, result.network
    alone = f"of {network} against percent of weights kept, one tensor pruned at a time"
    by_round = "Validation accuracy against compression, before and after retraining, for each round"
    by_epoch = "Training loss and validation accuracy by epoch"
    return Plots(
        layers=_svg(plots.layers(result.layers, result.density), f"Percent of weights kept in each layer of {network}"),
        sensitivity=_svg(plots.sensitivity(scan), f"Accuracy {alone}") if scan else None,
        sensitivity_loss=_svg(plots.sensitivity(scan, "loss"), f"Loss {alone}") if scan else None,
        rounds=_svg(plots.rounds(dense, rounds, run.control), by_round) if dense and rounds else None,
        training=_svg(plots.training(dense, rounds, run.control), by_epoch) if dense else None,
        histograms={
            each.name: _svg(plots.histogram(each), f"Histogram of the weights of {each.name}, dense and after pruning")
            for each in (run.histograms.tensors if run.histograms else ())
        },
    )


def _svg(figure: Figure, label: str) -> Markup:
    # Safe to leave unescaped: matplotlib escapes the text it draws, and to_svg escapes the label.
    from pipeline.results import figures

    return Markup(figures.inline(figures.to_svg(figure, label)))


def error(scores: Scores, samples: int, classes: int | None = None) -> str:
    """Top-1 error with its own 95% interval (Wilson's), and top-5 error where it was measured and says something."""
    low, high = stats.wilson(round((1 - scores.top1) * samples), samples)
    text = f"{percent(1 - scores.top1)} ({percent(low)} to {percent(high)})"
    shown = scores.top5 is not None and (classes is None or classes > FEW_CLASSES)
    return text + (f", top-5 {percent(1 - scores.top5)}" if shown and scores.top5 is not None else "")


def _smaller(value: int | None, whole: int) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{size(value)} ({number(whole / value)}× smaller)" if value else size(value)


def _latency(latency: LatencySummary | None) -> str:
    if latency is None:
        return NOT_MEASURED
    measured = {"dense": latency.dense, "pruned": latency.pruned, "compact": latency.compact}
    parts = [f"{name} {number(value)} ms" for name, value in measured.items() if value]
    said = f"; {latency.verdict}" if latency.verdict else ""
    return f"{', '.join(parts)} on {latency.device}, batch {latency.batch}{said}"
