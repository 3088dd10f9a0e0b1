"""What a reader finds in README.md and docs/: fenced blocks, the commands in them, and what is not run and why."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_MARK = re.compile(r"<!-- not run: (?P<reason>.+) -->")
_FENCE = re.compile(r"```(?P<kind>\S*)")


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason`: why its commands are not run, or None where they are."""

    page: Path
    line: int
    kind: str
    text: str
    reason: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command as it is typed, and the output that the page shows of it (... stands for anything)."""

    words: list[str]
    shown: str | None = None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page. A mark holds for the block right below it."""
    found: list[Block] = []
    reason: str | None = None
    opened: tuple[int, str] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None:
            if fence:
                found.append(Block(page, opened[0], opened[1], "\n".join(lines) + "\n", reason))
                opened, lines, reason = None, [], None
            else:
                lines.append(line)
        elif fence:
            opened = (number, fence["kind"])
        else:
            mark = _MARK.fullmatch(line.strip())
            assert not (reason and line.strip()), f"{page}:{number}: the mark above belongs to no block"
            reason = mark["reason"] if mark else reason
    assert opened is None, f"{page}:{opened}: the block has no end"
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a bash block, a line each; or of a console block, where they stand after `$ `."""
    text = block.text.replace("\\\n", " ")
    if block.kind == "bash":
        split = [shlex.split(line, comments=True) for line in text.splitlines()]
        return [Command(words) for words in split if words]
    first, *rest = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not first, f"{block.place}: output without a command"
    typed = [one.partition("\n") for one in rest]
    return [Command(shlex.split(line, comments=True), output) for line, _, output in typed]


def matches(shown: str, printed: str) -> bool:
    """Whether a page's output is what was printed, but for ... and for how wide gaps are."""
    pattern = r"\s+".join(".*?".join(re.escape(part) for part in word.split("...")) for word in shown.split())
    return re.search(pattern, printed, re.DOTALL) is not None


def inline(page: Path) -> list[str]:
    """What stands in backquotes outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)
