"""From a matplotlib figure to SVG text or PNG bytes, and the look that all our figures share.

Only matplotlib's object-oriented API with the Agg and SVG canvases: no pyplot, no window, no global figure.
"""

from __future__ import annotations

import html
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline import storage
from pipeline.base.errors import UserError

# Okabe and Ito's palette, told apart with every common colour blindness; yellow left out, too faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#595959")
INK, MUTED, GRID = "#1f2328", "#656d76", "#d9dee3"
# A page that holds the SVG recolours these by CSS variables (dark mode); alone, the colour itself stands.
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", "#ffffff": "page"}
VARIABLES |= {colour: f"c{i}" for i, colour in enumerate(PALETTE)}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "text.parse_math": False,  # a tensor's name is text, whatever it holds
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
# matplotlib's settings are one per process; figures are drawn by the driver and by the mirror's thread.
_LOCK = threading.RLock()


@contextmanager
def styled() -> Iterator[None]:
    """Our look, for as long as a figure is made or drawn."""
    with _LOCK, matplotlib.rc_context(_STYLE):
        yield


def new(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A figure (inches) and its axes, row by row. Call it, and draw, inside `styled()`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def to_svg(figure: Figure, label: str) -> str:
    """The figure as one `<svg>` element: text stays text, no outside resource; `label` is read out by a screen reader.

    The same figure, drawn anew, gives the same text, byte for byte.
    """
    buffer = io.StringIO()
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_facecolor("none")
    with styled():  # by the canvas itself: `savefig` lays a figure out, and draws it, twice
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue, which cannot stand inside a page
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    attributes = f'<svg role="img" aria-label="{html.escape(label, quote=True)}" '
    return svg.replace("<svg ", attributes, 1).strip()


def inline(svg: str, mark: str) -> str:
    """The element as HTML wants it: no namespace declaration, width from the page.

    `mark` comes before its ids, since figures that are alike in parts have ids in common.
    """
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{mark}-", svg)
    head, rest = svg.split(">", 1)
    head = head.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    width = re.search(r' width="([\d.]+)pt"', head)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    size = f' style="width:100%;max-width:{float(width[1]) * 4 / 3:.0f}px;height:auto"' if width else ""
    return f"{head}{size}>{rest}"


def to_png(figure: Figure, dots_per_inch: int = 144) -> bytes:
    """The figure on white, for viewers that do not show SVG. The same figure, drawn anew, gives the same bytes."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def require_name(file: str | None, option: str) -> None:
    """Raise UserError where a file that an option names is of no kind that figures are written as."""
    if file is not None and not file.endswith((".svg", ".png")):
        raise UserError(f"{option} {file}: is written as SVG or PNG; end the name in .svg or .png")


def write(figure: Figure, file: str, label: str, option: str) -> None:
    """Write a figure as SVG or PNG, by its file's name. Raises UserError, which names the option."""
    made = to_png(figure) if file.endswith(".png") else to_svg(figure, label).encode()
    try:
        storage.write_bytes(file, made)
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be written: {error.strerror}") from error
