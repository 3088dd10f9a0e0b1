"""The report is one file that needs nothing else, says what the run found, and takes hostile names as text."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import scan_records
from run_files import (
    LAYERS,
    begin,
    config,
    finals,
    histograms,
    put,
    result,
    round_done,
    scan,
    scores,
    taken,
    whole,
)

from pipeline.base.errors import UserError
from pipeline.results import figures, outcome, plots, report
from pipeline.run.records import DataFacts, DenseFigures, Histograms
from pipeline.settings.config import dump_config

HOSTILE = '<script>alert("x")</script>&amp;$\\frac{$'
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects what a browser would build, and complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_holds_the_verdict_and_the_numbers(tmp_path: Path) -> None:
    page = Page(report.render(whole(config(tmp_path))))
    assert "13.7× smaller at 1.62% error, 0.02 points better than the network it came from" in page.text
    for said in ("No loss of accuracy", "−0.15 to +0.21 points", "margin of 0.30 points", "13.7×", "1.62%"):
        assert said in page.text
    for said in ("19,424 of 266,200 weights kept", "90.3 kB", "dense control", "p = 0.822", "looked at once"):
        assert said in page.text
    for said in ("outputs after ReLU", "factory: lenet_300_100", "54,000", "7.25 s", "81.62%", "29.00%"):
        assert said in page.text
    assert page.open == []


def test_is_self_contained_and_accessible(tmp_path: Path) -> None:
    text = report.render(whole(config(tmp_path)))
    page = Page(text)
    assert not re.findall(r"https?://|@import|//cdn", text)
    assert not page.tags & {"link", "iframe", "object", "img"}
    assert text.count("<script") == text.count("<script>") == 1  # sorts a table, and needs nothing from elsewhere
    assert not [a for a in page.attributes if a[1] == "src" or a[1].startswith("on")]
    assert all(value.startswith("#") for _, name, value in page.attributes if name in ("href", "xlink:href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert set(re.findall(r'href="#([^"]+)', text)) <= set(ids)
    assert ("html", "lang", "en") in page.attributes
    svgs = text.count("<svg ")
    assert svgs == 2 * 5 + len(LAYERS) == len(re.findall(r'<svg role="img" aria-label="[^"]+"', text))
    assert text.count("<table") == text.count("<caption>")


def test_same_run_same_text(tmp_path: Path) -> None:
    run = whole(config(tmp_path))
    assert report.render(run) == report.render(run)
    assert report.write(run) == str(run / "report.html")
    assert (run / "report.html").read_text(encoding="utf-8") == report.render(run)
    assert not list(run.glob("*.tmp"))


def test_hostile_names_are_text(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = whole(settings)
    hostile = result(settings, name=HOSTILE, network=HOSTILE)
    hostile["layers"][0]["name"] = HOSTILE
    hostile["versions"][HOSTILE] = HOSTILE
    put(run / "result.json", taken(hostile))
    scan(run, [(HOSTILE, "fc", 10), ("_hidden", "fc", 10)])
    first, *others = histograms().tensors
    put(run / "final/histograms.json", Histograms((replace(first, name=HOSTILE), *others)))
    put(run / "data.json", DataFacts(1, 1, 1, 1, 1, source=HOSTILE, root=HOSTILE, bad={HOSTILE: "3"}))
    worst = config(tmp_path, tracking={"experiment": f"</code></pre>{HOSTILE}"})
    (run / "config.yaml").write_text(dump_config(worst), encoding="utf-8")
    text = report.render(run)
    page = Page(text)
    assert text.count("<script") == 1
    assert page.text.count(HOSTILE) >= 5
    assert ("svg", "aria-label", f"Percent of weights kept in each layer of {HOSTILE}") in page.attributes


def test_parts_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    settings = config(tmp_path, prune={"dense_control": False})
    run = begin(settings)
    bare = result(settings, latency_ms=None)
    bare["test"]["dense_control"] = None
    bare["bytes"] |= {"packed": None, "packed_index": None, "dense_gzip": None}
    bare["layers"][0] |= {"flops": None, "activation_density": None, "flops_density": None, "threshold": None}
    bare["flops_density"] = None
    put(run / "result.json", taken(bare))
    page = Page(report.render(run))
    assert "not measured" in page.text
    assert "prune.dense_control is off" in page.text
    assert "Sensitivity" not in page.text
    (run / "data.json").unlink()
    assert "not recorded" in Page(report.render(run)).text


@pytest.mark.parametrize(
    ("verdict", "interval", "said"),
    [
        ("undecided", [-0.001, 0.006], "neither shows a loss nor rules one out"),
        ("loss", [0.004, 0.009], "lies wholly above zero"),
        ("no loss", [0.0005, 0.0025], "there is a drop, small enough"),
    ],
)
def test_verdicts_are_explained(tmp_path: Path, verdict: str, interval: list[float], said: str) -> None:
    settings = config(tmp_path)
    run = whole(settings)
    changed = result(settings, verdict=verdict, test_looks=3)
    changed["test"]["mcnemar"]["drop_ci95"] = interval
    put(run / "result.json", taken(changed))
    text = Page(report.render(run)).text
    assert said in text
    assert "looked at 3 times" in text


def test_accuracy_among_the_classes_present(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = whole(settings)
    changed = result(settings)
    assert "classes present" not in report.render(run)
    changed["test"] |= {"dense": scores(0.7, top1_present=0.91), "pruned": scores(0.69, top1_present=0.905)}
    put(run / "result.json", taken(changed))
    text = Page(report.render(run)).text
    assert "10 classes present" in text
    assert "91.00%" in text
    assert "90.50%" in text


def test_user_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run"):
        report.render(tmp_path)
    settings = config(tmp_path)
    run = begin(settings)
    with pytest.raises(UserError, match="not finished"):
        report.render(run)
    finals(run, settings)
    (run / "data.json").write_text('{"train": 5', encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.json' is damaged"):
        report.render(run)


def test_summary_rows(tmp_path: Path) -> None:
    rows = dict(outcome.summary_rows(taken(result(config(tmp_path))), 0.005))
    assert rows["verdict"] == "no loss"
    assert rows["compression"] == "13.7×"
    assert rows["against dense control"] == "0.03 points worse (95% of the drop: −0.15 to +0.21 points)"
    assert rows["size, packed"] == "90.3 kB (11.8× smaller)"
    assert rows["latency"] == "not measured"


def test_scan_of_many_tensors_and_both_kinds() -> None:
    levels = [scan_records.level(d, top1=d, loss=1.0) for d in (0.8, 0.2, 0.01)]
    kinds = ["conv2d"] * 26 + ["linear"]
    tensors = [scan_records.tensor(f"t{i}.weight", 1000, levels, kind=k) for i, k in enumerate(kinds)]
    drawn = scan_records.scan(tensors, dense=DenseFigures(0.9, 0.3))
    figure = plots.sensitivity(drawn)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Convolutional", "Fully connected"]
    assert [len(axis.get_lines()) for axis in figure.axes] == [27, 2]
    svg = figures.to_svg(figure, "scan")
    assert "weights of the tensor kept (%)" in svg  # text stays text
    assert figures.to_png(figure).startswith(b"\x89PNG")
    assert svg == figures.to_svg(plots.sensitivity(drawn), "scan")


def test_undone_rounds_are_told_apart(tmp_path: Path) -> None:
    run = whole(config(tmp_path))
    round_done(run, 5, 0.03, accepted=False)
    assert "5 (undone)" in Page(report.render(run)).text
