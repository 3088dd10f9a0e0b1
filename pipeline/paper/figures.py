"""Figures 4 and 5 of the paper, from a mask and from measured curves; figures 6 and 7 are in `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator
from numpy.typing import NDArray

from pipeline.paper.curves import Curve
from pipeline.results.figures import INK, PALETTE, new, styled

CLOSE_UP = (-5.0, 1.0)  # points of accuracy, about the range of the paper's figure 5
_LOOKS = {
    "L2, retrained": (PALETTE[0], "o", "-"),
    "L1, retrained": (PALETTE[1], "s", "-"),
    "L1, not retrained": (PALETTE[1], "s", (0, (3, 2))),
    "L2, not retrained": (PALETTE[0], "o", (0, (3, 2))),
    "L2, iterative prune and retrain": (PALETTE[2], "D", "-"),
}


def bands(kept: NDArray[np.bool_], size: int) -> Figure:
    """Figure 4: where the first layer is non-zero; `kept` is (outputs, size * size), a column a pixel, row by row."""
    outputs, inputs = kept.shape
    assert inputs == size * size, kept.shape
    columns = kept.sum(0)
    ticks = list(range(0, inputs + 1, 4 * size))
    with styled():
        figure, axes = new(10.5, 5, 2, 2, width_ratios=[2.6, 1], height_ratios=[3, 1.4])
        pattern, picture, counts, spare = axes
        spare.remove()
        share = f"{kept.sum():,} of {kept.size:,} weights kept ({kept.mean():.1%})"
        pattern.imshow(kept, cmap=ListedColormap(["white", PALETTE[0]]), aspect="auto", interpolation="none")
        pattern.set_title(f"Non-zero weights, {outputs} × {inputs}: {share}")
        pattern.set_ylabel("output neuron")
        counts.fill_between(range(inputs), columns, step="mid", color=PALETTE[0], linewidth=0)
        counts.set_title("Non-zeros in each column", fontsize=9)
        counts.set_ylabel("non-zeros")
        counts.set_xlabel(f"input (pixel), {size} rows of {size} one after the other")
        counts.set_ylim(0)
        for axis in (pattern, counts):
            axis.set_xlim(0, inputs)
            axis.set_xticks(ticks)
        pattern.grid(visible=False)
        shown = picture.imshow(columns.reshape(size, size), cmap="Blues", interpolation="none", vmin=0)
        picture.set_title("Non-zeros of each pixel", fontsize=9)
        picture.grid(visible=False)
        picture.set_xticks([])
        picture.set_yticks([])
        picture.spines[:].set_visible(False)
        figure.colorbar(shown, ax=picture, shrink=0.7).outline.set_visible(False)
    return figure


@dataclass(frozen=True)
class Centre:
    """How the kept weights lie over the image: the share in its middle (half its height and width), and empty pixels.

    `rows` are the non-zeros of each row of pixels, from the top: the bands.
    """

    middle_share: float
    middle_area: float
    empty_pixels: int
    pixels: int
    rows: list[int]


def centre(kept: NDArray[np.bool_], size: int) -> Centre:
    """How the weights of figure 4 lie; `kept` is as in `bands`."""
    image = kept.sum(0).reshape(size, size)
    middle = slice(size // 4, size - size // 4)
    return Centre(
        middle_share=float(image[middle, middle].sum() / max(1, image.sum())),
        middle_area=float(image[middle, middle].size / image.size),
        empty_pixels=int((image == 0).sum()),
        pixels=int(image.size),
        rows=image.sum(1).tolist(),
    )


def tradeoff(curves: Sequence[Curve], title: str) -> Figure:
    """Figure 5: accuracy lost (points) against parameters away (%), close up as in the paper, and whole.

    The whole curve has a logarithmic axis, which widens its steep end.
    """
    with styled():
        figure, (close, whole) = new(10.5, 4.2, 1, 2)
        for axis in (close, whole):
            _tradeoff_panel(axis, curves)
        close.set_title(f"{title}, close up")
        close.set_ylim(*CLOSE_UP)
        close.set_ylabel("change of val accuracy (points)")
        close.yaxis.set_major_locator(MultipleLocator(1))
        whole.set_title("All of it, where it is steep drawn wider")
        whole.set_xscale("function", functions=(_stretched, _unstretched))
        whole.xaxis.set_major_locator(FixedLocator([0, 50, 80, 90, 95, 98, 99]))
        for axis in (close, whole):
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
        figure.legend(*close.get_legend_handles_labels(), loc="outside lower center", ncols=len(curves))
    return figure


def _tradeoff_panel(axis: Axes, curves: Sequence[Curve]) -> None:
    axis.axhline(0, color=INK, linewidth=1, zorder=1)
    for curve in curves:
        colour, marker, line = _LOOKS[curve.name]
        points = sorted(curve.points, key=lambda point: point.away)
        axis.plot(
            [100 * point.away for point in points],
            [-100 * point.loss for point in points],
            color=colour,
            marker=marker,
            linestyle=line,
            label=curve.name,
        )
    axis.set_xlabel("parameters pruned away")


def _stretched(away: NDArray[np.floating]) -> NDArray[np.floating]:
    """Percent away to the logarithm of what is kept, rising."""
    return -np.log(np.maximum(100 - away, 1e-6))


def _unstretched(value: NDArray[np.floating]) -> NDArray[np.floating]:
    return 100 - np.exp(-value)
