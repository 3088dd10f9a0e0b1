"""Tables as plain text cells, to be shown on a terminal or written as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NONE = "–"


@dataclass(frozen=True)
class TextTable:
    """A title, column heads, and rows of cells; the first column is text, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its title in bold above it."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value: float | None, digits: int = 1) -> str:
    """0.0812 as 8.1%."""
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def signed(value: float | None, digits: int = 1) -> str:
    """A difference of two shares in percentage points: 0.0012 as +0.1."""
    if value is None:
        return NONE
    text = f"{100 * value:+.{digits}f}"
    return text if text.strip("+-0.") else text.replace("-", "+")  # -0.0 is no difference


def short(value: float | None) -> str:
    """235200 as 235.2K."""
    if value is None:
        return NONE
    for unit, name in ((1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:g}"
