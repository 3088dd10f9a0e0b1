"""Colours of figures can be told from the page, light and dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scan_records
from matplotlib import colors
from run_files import config, result, taken

from pipeline.results import figures, plots
from pipeline.run.records import DenseFigures

PAGE = (Path(figures.__file__).parent / "report.html").read_text()
LIGHT, DARK, *_ = (dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", part)) for part in PAGE.split(":root {")[1:])


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21."""

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_lines_of_many_tensors_can_be_seen_on_either_page() -> None:
    levels = [scan_records.level(d, top1=d, loss=1.0) for d in (0.8, 0.1)]
    tensors = [scan_records.tensor(f"t{i}", 1000, levels, kind="conv2d") for i in range(26)]
    (axis,) = plots.sensitivity(scan_records.scan(tensors, dense=DenseFigures(0.9, 0.3))).axes
    drawn = {colors.to_hex(line.get_color()) for line in axis.get_lines() if str(line.get_label()).startswith("t")}
    assert len(drawn) == 26
    for colour in drawn:
        assert min(contrast(colour, page["page"]) for page in (LIGHT, DARK)) > 3, colour


@pytest.mark.parametrize("page", [LIGHT, DARK], ids=["light", "dark"])
def test_each_colour_that_the_page_gives_can_be_seen_on_it(page: dict[str, str]) -> None:
    """3 : 1 is what WCAG asks of lines and bars, 4.5 : 1 of text; the grid is meant to be faint."""
    for name in figures.VARIABLES.values():
        if name not in ("page", "grid", "c3", "c4", "c5"):
            least = 4.5 if name in ("ink", "muted") else 3
            assert contrast(page[name], page["page"]) >= least, name


def test_text_on_a_bar_takes_the_colour_of_the_page(tmp_path: Path) -> None:
    rows = [row.model_copy(update={"density": 0.99}) for row in taken(result(config(tmp_path))).layers]
    svg = figures.to_svg(plots.layers(rows, 0.99), "layers")
    assert "var(--page, #ffffff)" in svg
    for page in (LIGHT, DARK):
        assert contrast(page["c0"], page["page"]) > 4.5
