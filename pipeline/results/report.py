"""report.html: one file, readable anywhere, that says what a run found and how it was found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.results import figures, plots
from pipeline.run.contents import Contents, Json, read
from pipeline.run.records import Scan

NOT_MEASURED = "not measured"


def write(run_dir: str | Path) -> str:
    """Write `report.html` into the run directory and return where it is.

    Raises UserError if the run is not finished or a file of it is damaged.
    """
    target = storage.join(run_dir, "report.html")
    storage.write_bytes(target, render(run_dir).encode())
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
        result={"lineage": None, **result},
        verdict=verdict(result, margin(run)),
        reference=reference_name(result),
        rows=summary_rows(result),
        rounds=run.finished_rounds,
        unpruned=unpruned(result),
        undone=not all(metrics["accepted"] for metrics in run.finished_rounds),
        predictions=predictions(run),
        totals=totals(result),
        measured=measured_on(run.activity),
        cuts=scan_rows(run.scan),
        plots=_plots(run),
        config=json.loads(json.dumps(run.config, default=str)),
        command=f"secateur run {storage.join(run.path, 'config.yaml')}",
        seconds=result["seconds"],
        versions=result["versions"],
    )


def summary_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run found, as (label, value) for the terminal and the top of the report."""
    test, mcnemar, stored = result["test"], result["test"]["mcnemar"], result["bytes"]
    low, high = mcnemar["drop_ci95"]
    control = test["dense_control"]
    start = result.get("lineage")
    return [
        *([("started from", f"round {start['round']} of {start['run']}")] if start else []),
        ("verdict", result["verdict"]),
        ("compression", f"{number(result['compression'])}×"),
        ("weights kept", f"{count(result['weights_kept'])} of {count(result['weights_total'])}"),
        ("FLOPs left", percent(result["flops_density"], 1)),
        ("test error, dense", error(test["dense"])),
        ("test error, dense control", error(control) if control else NOT_MEASURED),
        ("test error, pruned", error(test["pruned"])),
        (f"drop against {reference_name(result)}", f"{points(drop(result))} (95%: {span(low, high)})"),
        ("size, dense fp32", size(stored["dense_fp32"])),
        ("size, pruned and gzipped", _smaller(stored["dense_gzip"], stored["dense_fp32"])),
        ("size, packed", _smaller(stored["packed"], stored["dense_fp32"])),
        ("latency", _latency(result["latency_ms"])),
        ("looks at test", str(result["test_looks"])),
    ]


def drop(result: Mapping[str, Any]) -> float:
    """Top-1 on test that pruning cost, a fraction; negative where the pruned network is better."""
    test = result["test"]
    reference = test["dense_control"] or test["dense"]
    return float(reference["top1"] - test["pruned"]["top1"])


def reference_name(result: Mapping[str, Any]) -> str:
    """What the pruned network was judged against."""
    return "dense control" if result["test"]["dense_control"] else "dense"


def margin(run: Contents) -> float | None:
    """The drop that the run was asked to stay within, a fraction."""
    value = (run.config.get("target") or {}).get("margin")
    return None if value is None else float(value)


def verdict(result: Mapping[str, Any], allowed: float | None) -> dict[str, str]:
    """The verdict in plain words: `title`, and `text` that says what it rests on."""
    low, high = result["test"]["mcnemar"]["drop_ci95"]
    limit = f"the margin of {points(allowed, sign='')}" if allowed is not None else "the margin asked for"
    interval = span(low, high)
    if unpruned(result):
        text = (
            "No round was accepted: each one lost more on val than target.tolerance, down to the smallest step. The "
            "network handed over is the dense one as it was."
        )
        return {"title": "Nothing was pruned", "text": text}
    if result["verdict"] == "no loss":
        text = f"Even the upper end of the drop's 95% interval ({interval}) is within {limit}."
        if low > 0:
            text += " The interval lies above zero: there is a drop, small enough to be within what was allowed."
        return {"title": "No loss of accuracy", "text": text}
    if result["verdict"] == "loss":
        text = f"The drop's 95% interval ({interval}) lies wholly above zero: the pruned network is less accurate."
        return {"title": "Accuracy was lost", "text": text}
    text = (
        f"The drop's 95% interval ({interval}) holds zero but reaches past {limit}: the test neither shows a loss "
        "nor rules one out that matters. A larger test set, or less pruning, would decide."
    )
    return {"title": "Undecided", "text": text}


def unpruned(result: Mapping[str, Any]) -> bool:
    """Whether a campaign ended with the dense network: nothing is pruned, and no round was accepted."""
    return result["weights_kept"] == result["weights_total"] and not any(row["accepted"] for row in result["rounds"])


def predictions(run: Contents) -> dict[int, dict[str, float]]:
    """By round, the rise of the loss before retraining: as the scan predicted it, the least that it thought possible,
    and as it was measured on val against the dense network (nats). Gradual pruning has no such moment."""
    found: dict[int, dict[str, float]] = {}
    if (run.config.get("prune") or {}).get("gradual"):
        return found
    for each in run.rounds:
        said = (each.plan or {}).get("predicted")
        if said is not None and each.metrics is not None and run.dense is not None:
            measured = each.metrics["val_before_retrain"]["loss"] - run.dense["val"]["loss"]
            found[each.number] = {"rise": said["rise"], "least": said["least"], "measured": measured}
    return found


def totals(result: Mapping[str, Any]) -> dict[str, Any]:
    """The layer table's last row. Act% has none: layers' outputs differ in number, which result.json does not hold."""
    flops = [row["flops"] for row in result["layers"]]
    packed, kept = result["bytes"]["packed"], result["weights_kept"]
    return {
        "weights": result["weights_total"],
        "flops": None if not flops or None in flops else sum(flops),
        "density": result["density"],
        "flops_density": result["flops_density"],
        "bits": None if packed is None or not kept else 8 * packed / kept,
    }


def measured_on(activity: Iterable[Json]) -> dict[str, list[str]]:
    """Which tensor Act% was measured on -> names of the layers."""
    found: dict[str, list[str]] = {}
    for row in activity:
        found.setdefault(str(row["measured"]), []).append(str(row["name"]))
    return found


@dataclass(frozen=True)
class Cut:
    """What the scan says of a tensor; `within` is the smallest density tried whose drop stays within delta, if any."""

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


def _plots(run: Contents) -> dict[str, Any]:
    """SVG elements by name; None where the run does not hold what they show."""
    result, rounds = run.result, run.finished_rounds
    assert result is not None
    network = result["network"]
    drawn: dict[str, Any] = {
        "layers": _svg(plots.layers(result), f"Percent of weights kept in each layer of {network}"),
        "sensitivity": None,
        "sensitivity_loss": None,
        "rounds": None,
        "training": None,
        "histograms": {},
    }
    if run.scan is not None:
        label = f"Accuracy of {network} against percent of weights kept, one tensor pruned at a time"
        drawn["sensitivity"] = _svg(plots.sensitivity(run.scan), label)
        drawn["sensitivity_loss"] = _svg(plots.sensitivity(run.scan, "loss"), label.replace("Accuracy", "Loss"))
    if run.dense is not None and rounds:
        label = "Validation accuracy against compression, before and after retraining, for each round"
        drawn["rounds"] = _svg(plots.rounds(run.dense, rounds, run.control), label)
    if run.dense is not None:
        label = "Training loss and validation accuracy by epoch"
        drawn["training"] = _svg(plots.training(run.dense, rounds, run.control), label)
    if run.histograms is not None:
        drawn["histograms"] = {
            name: _svg(figure, f"Histogram of the weights of {name}, dense and after pruning")
            for name, figure in plots.histograms(run.histograms).items()
        }
    return drawn


def _svg(figure: Figure, label: str) -> Markup:
    # Safe to leave unescaped: matplotlib escapes the text it draws, and to_svg escapes the label.
    return Markup(figures.inline(figures.to_svg(figure, label)))


def percent(value: float | None, digits: int = 2) -> str:
    """0.9836 as 98.36%."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f}%"


def points(value: float, sign: str = "+") -> str:
    """0.0005 as +0.05 points, of percent."""
    return f"{100 * value:{sign}.2f} points".replace("-", "−")


def span(low: float, high: float) -> str:
    """An interval, in points."""
    return f"{points(low).removesuffix(' points')} to {points(high)}"


def error(scores: Mapping[str, Any]) -> str:
    """Top-1 error, and top-5 error where it was measured."""
    top5 = scores.get("top5")
    return percent(1 - scores["top1"]) + (f" (top-5 {percent(1 - top5)})" if top5 is not None else "")


def count(value: float | None) -> str:
    """266200 as 266,200."""
    return NOT_MEASURED if value is None else f"{value:,}"


def short(value: float | None) -> str:
    """235200 as 235K, as the paper's tables have it."""
    if value is None:
        return NOT_MEASURED
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes as kB or MB (powers of ten)."""
    if value is None:
        return NOT_MEASURED
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:g} B"


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, never in powers of ten below 100,000."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as 3 h 05 min, 4 min 10 s or 2.5 s."""
    if seconds is None:
        return NOT_MEASURED
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 60:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds:.3g} s"


def moment(milliseconds: int) -> str:
    """Milliseconds since 1970 as date and time in UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _smaller(value: int | None, whole: int) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{size(value)} ({number(whole / value)}× smaller)" if value else size(value)


def _latency(latency: Mapping[str, Any] | None) -> str:
    if latency is None:
        return NOT_MEASURED
    parts = [f"{name} {number(latency[name])} ms" for name in ("dense", "pruned", "compact") if latency[name]]
    said = f"; {latency['verdict']}" if latency["verdict"] else ""
    return f"{', '.join(parts)} on {latency['device']}, batch {latency['batch']}{said}"
