"""What mkdocs adds to docs/: README.md as the first page, other pages of the repository, and the reference."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = ("configs/*.md", "benchmarks/*.md", "infra/**/README.md", "tests/faults/seen.md", "CHANGELOG.md")
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for path in sorted(path for pattern in ELSEWHERE for path in ROOT.glob(pattern)):
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    for name, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links, which hold in the repository, hold on the site. Files that are linked to come along."""
    source = page.file.abs_src_path
    if source is None:
        return markdown

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(Path(source).parent / link["path"]))
        if target.is_dir():
            target /= "README.md"
        if not target.is_file() or not target.is_relative_to(ROOT):
            return link[0]  # mkdocs says that it leads nowhere
        place = _place(target)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(target)))
        here = PurePosixPath(page.file.src_uri).parent
        return os.path.relpath(place, here) + (link["anchor"] or "")

    return _LINK.sub(moved, markdown)


def _place(path: Path) -> str:
    """Where a file of the repository lies on the site."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"
