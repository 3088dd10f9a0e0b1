"""The paper's figures for one run, each a matplotlib Figure; `figures.to_svg` and `to_png` write them out.

Arguments are what the run directory holds (see `contents.py`); accuracies there are fractions, here percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from pipeline.results.budgets import Options
from pipeline.results.figures import GRID, INK, MUTED, PALETTE, new, styled
from pipeline.run.records import DenseFigures, DenseMetrics, Level, RoundMetrics, Scan, TensorScan, WeightHistogram
from pipeline.run.result import LayerResult, Result

Part = Mapping[str, Any]
Metric = Literal["top1", "loss"]
_MARKERS = "osD^vPX*"
NARROW = 4.2  # inches: the text of a figure so wide can be read at 390 pixels
# As light as each other, and at least 3.6 : 1 from a white page and from a dark one.
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#2a7fc0", "#b84fa0", "#d8650a"])
_KEPT_TICKS = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1)


def sensitivity(scan: Scan, metric: Metric = "top1", narrow: bool = False) -> Figure:
    """Figure 6: accuracy on val when one tensor alone is cut to so many % of its weights, nothing retrained.

    `metric` "loss" draws the loss instead. Bands are 95% intervals of the change against the dense network, paired.
    `narrow`, here and below, is for a telephone: panels stand one above the other.
    """
    panels = [
        (title, group)
        for title, group in (
            ("Convolutional", [t for t in scan.tensors if is_convolution(t.kind)]),
            ("Fully connected", [t for t in scan.tensors if not is_convolution(t.kind)]),
        )
        if group
    ]
    with styled():
        names = max((min(len(group), 16) for _, group in panels), default=0)
        shares = [2 if len(group) > 16 else 1 for _, group in panels]  # a long legend takes half of its panel
        height = max(3.4, 0.9 + 0.17 * names)
        count = max(1, len(panels))
        if narrow:
            below = [2.7 + 0.17 * ((min(len(group), 32) + 1) // 2) for _, group in panels] or [2.7]
            figure, axes = new(NARROW, sum(below), count, 1, height_ratios=below)
        else:
            figure, axes = new(10.5, height, 1, count, sharey=True, width_ratios=shares or None)
        for axis, (title, group) in zip(axes, panels, strict=False):
            _sensitivity_panel(axis, group, scan, metric, narrow)
            axis.set_title(title if len(panels) > 1 else "")
        for axis in axes if narrow else axes[:1]:
            axis.set_ylabel(
                f"top-1 accuracy on {scan.split} (%)" if metric == "top1" else f"loss on {scan.split} (nats)"
            )
        for axis in axes if metric == "loss" else ():
            _log_axis(axis)
    return figure


def _log_axis(axis: Axes) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def is_convolution(kind: str) -> bool:
    """Whether a layer's kind ("Conv2d", "conv", ...) belongs in the convolutional panel."""
    return kind.lower().startswith("conv")


def _sensitivity_panel(
    axis: Axes, group: Sequence[TensorScan], scan: Scan, metric: Metric, narrow: bool = False
) -> None:
    few = len(group) <= len(PALETTE)
    unit = 100 if metric == "top1" else 1
    dense = _measured(scan.dense, metric)
    # Many tensors: colour tells the depth, from first (blue) to last (orange); eight colours cannot name 26 lines.
    axis.axhline(unit * dense, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
    for i, tensor in enumerate(group):
        colour = PALETTE[i] if few else _DEPTH(i / (len(group) - 1))
        levels = sorted(tensor.levels, key=lambda level: -level.density)
        kept = [100 * level.density for level in levels]
        mark = _MARKERS[i % len(_MARKERS)] if few else ""
        axis.plot(
            kept,
            [unit * _measured(level, metric) for level in levels],
            color=colour,
            marker=mark,
            markersize=4,
            linewidth=1.6 if few else 1.2,
            label=_short(tensor.name),
        )
        bands = [(100 * level.density, *band) for level in levels if (band := _band(level, dense, metric))]
        if few and bands:
            x, low, high = zip(*bands, strict=True)
            axis.fill_between(
                x, [unit * v for v in low], [unit * v for v in high], color=colour, alpha=0.14, linewidth=0
            )
    smallest = 100 * min((level.density for t in group for level in t.levels), default=0.01)
    _kept_axis(axis, smallest)
    axis.set_xlabel("weights of the tensor kept (%)")
    columns = 1 if len(group) <= 16 else 2
    if narrow:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, labelspacing=0.25, handlelength=1.6)
        return
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns, labelspacing=0.25, handlelength=1.6)


def _measured(given: DenseFigures | Level, metric: Metric) -> float:
    return given.top1 if metric == "top1" else given.loss


def _band(level: Level, dense: float, metric: Metric) -> tuple[float, float] | None:
    """The interval of a level's metric: the dense network's less the drop's, or plus the rise's; None without one."""
    if metric == "top1":
        return max(0.0, dense - level.drop_high), min(1.0, dense - level.drop_low)
    if level.rise_low is None or level.rise_high is None:
        return None
    return max(0.1 * level.loss, dense + level.rise_low), dense + level.rise_high  # the axis is logarithmic


def _kept_axis(axis: Axes, smallest: float) -> None:
    """Percent kept, falling to the right: logarithmic where the levels go below 10%, where the curves bend."""
    if smallest < 10:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([t for t in _KEPT_TICKS if t >= smallest * 0.9]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlim(115, smallest * 0.87)
    else:
        axis.set_xlim(102, max(0.0, smallest - 2))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def rounds(
    dense: DenseMetrics, metrics: Sequence[RoundMetrics], control: DenseMetrics | None = None, narrow: bool = False
) -> Figure:
    """Top-1 accuracy on val against compression, a point a round: with the drop before retraining, and close up.

    The line begins with the dense network, at 1×.
    """
    with styled():
        figure, (whole, close) = new(NARROW, 5.6, 2, 1) if narrow else new(10.5, 3.3, 1, 2)
        kept = sorted((m for m in metrics if m.accepted), key=lambda m: m.compression)
        undone = [m for m in metrics if not m.accepted]
        x = [m.compression for m in kept]
        before = [100 * m.val_before_retrain.top1 for m in kept]
        after = [100 * m.val.top1 for m in kept]
        whole.vlines(x, before, after, color=GRID, linewidth=2.5, zorder=1)
        whole.plot(x, before, "v", color=PALETTE[1], linestyle="none", label="pruned, before retraining")
        for m in kept:
            spot = (m.compression, 100 * m.val.top1)
            close.annotate(f"{m.round}", spot, xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        for axis, title in ((whole, "Before and after retraining"), (close, "After retraining, close up, by round")):
            axis.axhline(100 * dense.val.top1, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="dense")
            if control is not None:
                level = 100 * control.val.top1
                axis.axhline(level, color=MUTED, linewidth=1.3, linestyle=(0, (1, 1.5)), label="dense control")
            line = [1.0, *x], [100 * dense.val.top1, *after]
            axis.plot(*line, "o-", color=PALETTE[0], label="pruned and retrained", markevery=slice(1, None))
            if undone:
                spots = [m.compression for m in undone], [100 * m.val.top1 for m in undone]
                axis.plot(*spots, "x", color=PALETTE[1], linestyle="none", label="undone")
            _compression_axis(axis, [1.0, *x, *(m.compression for m in undone)])
            axis.margins(y=0.14)
            axis.set_title(title)
            axis.set_xlabel("compression (weights / weights kept)")
        whole.set_ylabel("top-1 accuracy on val (%)")
        whole.legend(loc="lower left")
    return figure


def compared(results: Sequence[Result]) -> Figure:
    """Error on val against compression: a line a run through its accepted rounds, from its dense network on."""
    with styled():
        figure, (axis,) = new(6.8, 3.8)
        for number, result in enumerate(results):
            rounds = sorted((each for each in result.rounds if each.accepted), key=lambda each: -each.density)
            x = [1.0, *(1 / each.density for each in rounds)]
            y = [100 * (1 - top1) for top1 in (result.val.dense.top1, *(each.val_top1 for each in rounds))]
            colour, marker = PALETTE[number % len(PALETTE)], _MARKERS[number % len(_MARKERS)]
            axis.plot(x, y, label=result.name, color=colour, marker=marker)
        _compression_axis(axis, [1.0, *(result.compression for result in results)])
        axis.margins(y=0.14)
        axis.set_xlabel("compression (weights / weights kept)")
        axis.set_ylabel("error on val (%)")
        axis.legend(loc="best")
    return figure


def _compression_axis(axis: Axes, values: Sequence[float]) -> None:
    largest = max(values)
    axis.set_xscale("log")
    steps = [m * 10**e for e in range(5) for m in (1, 1.5, 2, 3, 5, 7)]
    axis.xaxis.set_major_locator(FixedLocator([s for s in steps if s <= largest * 1.12]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_xlim(0.93, largest * 1.12)


def budgets(options: Options) -> Figure:
    """Predicted rise of the loss before retraining against compression: the curve, and the budgets asked for."""
    with styled():
        figure, (axis,) = new(6.2, 3.4)
        for points, look, label in ((options.curve, "-", "least predicted"), (options.asked, "o", "asked for")):
            x = [each.compression for each in points]
            axis.plot(x, [each.solution.rise for each in points], look, color=PALETTE[0], label=label)
        axis.axhline(options.chance, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="chance")
        _compression_axis(axis, [each.compression for each in options.curve])
        axis.set_yscale("log")
        axis.set_ylim(1e-4, 3 * options.chance)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"compression in {options.unit}")
        axis.set_ylabel("rise of the loss on val (nats)")
        axis.legend(loc="lower right")
    return figure


def histogram(tensor: WeightHistogram) -> Figure:
    """Figure 7: a tensor's weights before pruning (one peak at 0) and the kept ones after (two lobes)."""
    with styled():
        figure, axes = new(5.2, 1.9, 1, 2, sharex=True)
        edges = tensor.edges
        for axis, counts, colour, title in (
            (axes[0], tensor.before, MUTED, "dense"),
            (axes[1], tensor.after, PALETTE[0], "pruned, retrained"),
        ):
            axis.stairs(counts, edges, fill=True, color=colour, alpha=0.85)
            axis.set_title(title, fontsize=8, fontweight="normal")
            axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
            axis.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
            axis.set_xlabel("weight")
            axis.grid(visible=False, axis="x")
            axis.set_xlim(edges[0], edges[-1])
        axes[0].set_ylabel("count")
    return figure


def layers(rows: Sequence[LayerResult], density: float, narrow: bool = False) -> Figure:
    """Weights kept in each layer, in percent; `density` is that of all of them together."""
    with styled():
        figure, (axis,) = new(NARROW if narrow else 10.5, 0.9 + 0.24 * max(2, len(rows)))
        kept = [100 * row.density for row in rows]
        places = range(len(rows))
        axis.barh(places, [100] * len(rows), color=GRID, height=0.66)
        axis.barh(places, kept, color=PALETTE[0], height=0.66)
        for place, row, percent in zip(places, rows, kept, strict=True):
            text = f"{percent:.3g}%  of {_count(row.weights)}"
            full = percent > (60 if narrow else 85)  # then the text would leave the axis
            axis.annotate(
                text, (percent, place), xytext=(-5 if full else 5, 0), textcoords="offset points", va="center",
                ha="right" if full else "left", fontsize=8, color="white" if full else INK,
                bbox={"facecolor": PALETTE[0] if full else GRID, "edgecolor": "none", "pad": 0.6},  # over the line
            )  # fmt: skip
        overall = 100 * density
        axis.axvline(overall, color=PALETTE[1], linewidth=1.2, linestyle=(0, (4, 3)))
        axis.set_yticks(list(places), [_short(row.name, 16 if narrow else 28) for row in rows], color=INK)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("weights kept (%)")
        axis.legend(handles=[_line(PALETTE[1], f"all layers: {overall:.3g}%", dashed=True)], loc="lower right")
    return figure


def training(
    dense: DenseMetrics, metrics: Sequence[RoundMetrics], control: DenseMetrics | None = None, narrow: bool = False
) -> Figure:
    """Loss and val accuracy by epoch: dense training, then each round's retraining, one after the other.

    Attempts that were undone are no part of the network's training and are left out.
    """
    segments = [("dense", dense.history), *((f"round {m.round}", m.history) for m in metrics if m.accepted)]
    with styled():
        figure, axes = new(NARROW if narrow else 10.5, 4.6, 2, 1, sharex=True)
        start, ends = 0, []
        for i, (_, history) in enumerate(segments):
            colour = MUTED if i == 0 else PALETTE[0]
            epochs = [start + k + 1 for k in range(len(history))]
            _curve(axes[0], epochs, [epoch.loss for epoch in history], colour)
            _curve(axes[1], epochs, [100 * epoch.val_top1 for epoch in history], colour)
            start += len(history)
            ends.append(start)
        if control is not None:
            epochs = [ends[0] + k + 1 for k in range(len(control.history))]
            _curve(axes[0], epochs, [epoch.loss for epoch in control.history], PALETTE[1], dashed=True)
            _curve(axes[1], epochs, [100 * epoch.val_top1 for epoch in control.history], PALETTE[1], dashed=True)
        for axis in axes:
            for end in ends[:-1]:
                axis.axvline(end + 0.5, color=GRID, linewidth=1)
        _name_segments(axes[0], [name for name, _ in segments], ends, 3 if narrow else 10)
        axes[0].set_ylabel("training loss")
        if min((epoch.loss for _, history in segments for epoch in history), default=0.0) > 0:
            _log_axis(axes[0])
        axes[1].set_ylabel("top-1 on val (%)")
        axes[1].set_xlabel("epoch")
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        lines = [_line(MUTED, "dense"), _line(PALETTE[0], "pruned, retraining")]
        if control is not None:
            lines.append(_line(PALETTE[1], "dense control", dashed=True))
        axes[1].legend(handles=lines, loc="lower right")
    return figure


def _curve(axis: Axes, x: Sequence[int], y: Sequence[float], colour: str, dashed: bool = False) -> None:
    axis.plot(x, y, color=colour, marker=".", markersize=4, linestyle=(0, (3, 2)) if dashed else "-")


def _name_segments(axis: Axes, names: Sequence[str], ends: Sequence[int], most: int) -> None:
    """The segments' names above the axis, unless there are more than can be read."""
    if len(names) > most:
        return
    for name, start, end in zip(names, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            middle = (start + end + 1) / 2
            place = axis.get_xaxis_transform()
            axis.text(middle, 1.02, name, transform=place, ha="center", va="bottom", fontsize=7.5, color=MUTED)


def _line(colour: str, label: str, dashed: bool = False) -> Line2D:
    return Line2D([], [], color=colour, linestyle=(0, (3, 2)) if dashed else "-", label=label)


def _short(name: str, longest: int = 28) -> str:
    """A tensor's name without `.weight`, the middle cut out where it is long; a leading `_` would hide it from a
    legend."""
    name = name.removesuffix(".weight")
    name = name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 + 1 :]}"
    return f" {name}" if name.startswith("_") else name


def _count(value: float) -> str:
    """1234567 as 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"
