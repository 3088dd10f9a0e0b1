"""The report's page in a real browser: on a telephone, without a violation of axe-core's rules, sorted, and printed."""

from __future__ import annotations

import html
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from run_files import config, whole
from test_browser import chromium

from pipeline.results import report

# The page in a frame of a given width, whose measures end up in the text of the outer page.
FRAME = """<!doctype html><html lang="en"><title>frame</title><body style="margin:0">
<iframe id="frame" title="report" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("frame").addEventListener("load", async () => {{
  const view = document.getElementById("frame").contentWindow, page = view.document;
  const found = await (async () => {{ {script} }})();
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script></body></html>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return report.render(whole(config(folder)))


def seen(page: str, script: str, folder: Path, width: int = 390, *options: str) -> Any:
    """What the script finds in the page, as JSON; `view` and `page` are its window and document."""
    file = folder / "frame.html"
    file.write_text(FRAME.format(width=width, page=html.escape(page, quote=True), script=script), encoding="utf-8")
    arguments = ["--virtual-time-budget=30000", "--dump-dom", *options, file.as_uri()]
    dom = chromium(*arguments, folder=folder).stdout.decode()
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    assert found[1], "the script did not end"
    return json.loads(html.unescape(found[1]))


WIDER = """
  const wide = [...page.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > view.innerWidth
    + 1 && !one.closest("svg")).map((one) => one.tagName + " " + one.className + " " + one.textContent.slice(0, 30));
  const scrolled = [...page.querySelectorAll("*")].filter((one) => one.clientWidth && one.scrollWidth > one.clientWidth
    + 1 && ["auto", "scroll"].includes(view.getComputedStyle(one).overflowX)).map((one) => one.tagName);
  return {wide, scrolled, width: page.documentElement.scrollWidth};
"""


@pytest.mark.parametrize("width", [390, 1000])
def test_nothing_is_wider_than_the_page(page: str, width: int, tmp_path: Path) -> None:
    assert seen(page, WIDER, tmp_path, width) == {"wide": [], "scrolled": [], "width": width}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1000])
def test_axe_finds_nothing(page: str, width: int, dark: bool, tmp_path: Path) -> None:
    package = importlib.util.find_spec("axe_core_python")
    if package is None or package.origin is None:
        pytest.skip("axe-core-python is not installed")
    rules = Path(package.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    given = page.replace("</body>", f"<script>{rules}</script></body>")
    script = """
      const found = await view.axe.run(page, {resultTypes: ["violations"]});
      return found.violations.map((one) => [one.id, one.impact, one.nodes.slice(0, 3).map((node) => node.html)]);
    """
    options = ["--blink-settings=preferredColorScheme=0"] if dark else []
    assert seen(given, script, tmp_path, width, *options) == []


def test_the_layers_are_sorted_by_a_button(page: str, tmp_path: Path) -> None:
    script = """
      const names = () => [...page.querySelectorAll("#layers tbody th")].map((one) => one.textContent);
      const head = page.querySelectorAll("#layers thead th")[1], before = names();
      head.querySelector("button").click();
      const once = [names(), head.getAttribute("aria-sort")];
      head.querySelector("button").click();
      return [before, once, [names(), head.getAttribute("aria-sort")]];
    """
    layers = ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert seen(page, script, tmp_path) == [layers, [layers, "descending"], [layers[::-1], "ascending"]]


def test_it_is_printed(page: str, tmp_path: Path) -> None:
    file, printed = tmp_path / "report.html", tmp_path / "report.pdf"
    file.write_text(page, encoding="utf-8")
    chromium("--no-pdf-header-footer", f"--print-to-pdf={printed}", file.as_uri(), folder=tmp_path)
    counts = [int(found) for found in re.findall(rb"/Count (\d+)", printed.read_bytes())]
    assert max(counts) <= 6
