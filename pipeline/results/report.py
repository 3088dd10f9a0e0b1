"""report.html: one file, readable anywhere, that says what a run found and how it was found."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.results import outcome, worth
from pipeline.results.words import (
    count,
    duration,
    moment,
    number,
    percent,
    points,
    short,
    size,
)
from pipeline.run.contents import Contents, mirrored_files, read
from pipeline.run.records import LayerActivity, Scan
from pipeline.run.result import Result

if TYPE_CHECKING:  # matplotlib is loaded where a figure is drawn: it takes most of a second
    from matplotlib.figure import Figure


def write(run_dir: str | Path, check: storage.Check | None = None) -> str:
    """Write `report.html` into the run directory and return where it is.

    `check` is called before each try. Raises UserError if the run is not finished or a file of it is damaged.
    """
    target = storage.join(run_dir, "report.html")
    storage.write_bytes(target, render(run_dir).encode(), check)
    return target


def render(run_dir: str | Path) -> str:
    """The report as HTML text: one self-contained page, the same for the same run. Its one script sorts a table.

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
        verdict=outcome.verdict(result, run.config.target.margin),
        reference=outcome.reference_name(result),
        rows=outcome.rows_of(run, result),
        rounds=run.finished_rounds,
        unpruned=outcome.unpruned(result),
        undone=not all(metrics.accepted for metrics in run.finished_rounds),
        predictions=predictions(run),
        totals=totals(result),
        measured=measured_on(run.activity),
        cuts=scan_rows(run.scan),
        plots=plots_of(run, result),
        sentence=outcome.sentence(result),
        loading=_loading(run),
        command=outcome.repeat_command(run, run.path),
        seconds=dict(result.seconds),
    )


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
    """The scan's results for a tensor; `within` is the smallest density tried whose drop stays within delta, if any.

    A group of channels has no threshold of single weights, and so neither sigma nor quality.
    """

    name: str
    weights: int
    sigma: float | None
    quality: float | None
    threshold: float | None
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
        if tensor.of_channels:
            rows.append(Cut(tensor.name, tensor.weights, None, None, None, within))
            continue
        threshold = tensor.quality * tensor.sigma
        rows.append(Cut(tensor.name, tensor.weights, tensor.sigma, tensor.quality, threshold, within))
    return rows


@dataclass(frozen=True)
class Plots:
    """SVG elements, wide ones and narrow ones side by side, of which the page's width chooses; `histograms` by tensor.

    None where the run does not hold what they show, or too little of it to draw.
    """

    layers: Markup
    sensitivity: Markup | None
    sensitivity_loss: Markup | None
    rounds: Markup | None
    training: Markup | None
    histograms: dict[str, Markup]


_DRAWN: dict[str, Plots] = {}  # those of the report that was written last, by what they show


def plots_of(run: Contents, result: Result) -> Plots:
    """The figures of a finished run. They take seconds, and stay as they are where the report is written again."""
    parts = (run.scan, run.dense, run.finished_rounds, run.control, run.histograms)
    shown = repr((*parts, result.layers, result.density, result.network))
    if shown not in _DRAWN:
        _DRAWN.clear()
        _DRAWN[shown] = drawn(run, result)
    return _DRAWN[shown]


def drawn(run: Contents, result: Result) -> Plots:
    """The figures of a finished run, made anew."""
    from pipeline.results import plots

    scan, dense, rounds, network = run.scan, run.dense, run.finished_rounds, result.network
    alone = f"of {network} against percent of weights kept, one tensor pruned at a time"
    by_round = "Validation accuracy against compression, before and after retraining, for each round"
    by_epoch = "Training loss and validation accuracy by epoch"
    return Plots(
        layers=_both(
            lambda narrow: plots.layers(result.layers, result.density, narrow),
            f"Percent of weights kept in each layer of {network}",
        ),
        sensitivity=_both(lambda narrow: plots.sensitivity(scan, narrow=narrow), f"Accuracy {alone}")
        if scan and worth.sensitivity(scan)
        else None,
        sensitivity_loss=_both(lambda narrow: plots.sensitivity(scan, "loss", narrow), f"Loss {alone}")
        if scan and worth.sensitivity(scan)
        else None,
        rounds=_both(lambda narrow: plots.rounds(dense, rounds, run.control, narrow), by_round)
        if dense and worth.rounds(rounds)
        else None,
        training=_both(lambda narrow: plots.training(dense, rounds, run.control, narrow), by_epoch)
        if dense and worth.training(dense, rounds)
        else None,
        histograms={
            each.name: _svg(plots.histogram(each), f"Histogram of the weights of {each.name}, dense and after pruning")
            for each in (run.histograms.tensors if run.histograms else ())
            if worth.histogram(each)
        },
    )


def _both(draw: Callable[[bool], Figure], label: str) -> Markup:
    """A figure for wide pages, and one for narrow ones."""
    made = [
        Markup('<div class="{}">{}</div>').format(name, _svg(draw(narrow), label, name))
        for name, narrow in (("wide", False), ("narrow", True))
    ]
    return Markup("").join(made)


def _svg(figure: Figure, label: str, width: str = "any") -> Markup:
    # Safe to leave unescaped: matplotlib escapes the text it draws, and to_svg escapes the label.
    from pipeline.results import figures

    mark = f"{width}-{zlib.crc32(label.encode()):08x}"
    return Markup(figures.inline(figures.to_svg(figure, label), mark))


def _loading(run: Contents) -> list[tuple[str, str]]:
    """How to load what the run made: a sentence, and a few lines of Python."""
    final = f"{run.path}/final"
    ways = [
        (
            "The weights, in the network's own layout; pruned ones are 0.",
            f'from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file("{final}/model.safetensors"))',
        ),
    ]
    there = mirrored_files(run.path)
    for name, text in (("model.onnx", "The network as ONNX"), ("compact.onnx", "The same without its dead units")):
        if f"final/{name}" in there:
            lines = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{final}/{name}")\n'
            lines += '(logits,) = session.run(["output"], {"input": images})  # float32, normalised'
            ways.append((f"{text}, without its code.", lines))
    return ways
