"""The pages of docs/, built: without a warning, with links that hold, and nothing fetched from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
from support import ROOT, program

from cluster.cli import app
from pipeline.settings.config import flatten, parse_config

pytest.importorskip("mkdocs", reason="mkdocs is not installed: make install")
FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
MOST_WORDS = 1200  # of README.md: five minutes of reading


class Page(HTMLParser):
    """The links of a page, what it fetches, and the anchors in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(FETCHED.get(tag, "")):
            self.fetched.append(values[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    done = program("mkdocs", "build", "--strict", "--site-dir", str(out), ray=False, NO_MKDOCS_2_WARNING="1")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "WARNING" not in said
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file.read_text()) for file in sorted(site.rglob("*.html"))}


def test_every_link_within_holds(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for file, page in pages.items():
        for link in page.links + page.fetched:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or (file.name == "404.html" and link.startswith("/")):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors
            ):
                broken.append(f"{file.relative_to(site)}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000  # so there was something to check


def test_nothing_is_fetched_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    outside = {link for page in pages.values() for link in page.fetched if urlsplit(link).netloc}
    assert outside == set()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet.name


def test_the_reference_has_every_setting_command_and_field(site: Path) -> None:
    settings = (site / "reference/settings.html").read_text()
    known = {name.replace("start.source", "start.from") for name in flatten(parse_config({"name": "a"}))}
    assert {name for name in known if f"<code>{name}</code>" not in settings} == set()
    commands = (site / "reference/commands.html").read_text()
    group = typer.main.get_command(app)
    assert {name for name in group.commands if f"secateur {name}" not in commands} == set()
    result = (site / "reference/result.html").read_text()
    assert all(f"<code>{name}</code>" in result for name in ("verdict", "weights_kept", "mcnemar", "drop_ci95"))
    python = (site / "reference/python.html").read_text()
    assert all(f'id="secateur.{name}"' in python for name in ("prune", "scan", "plan", "load", "hold"))


def test_the_readme_takes_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS
