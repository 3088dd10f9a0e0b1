"""Names that a user types: the nearest known one where a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from pipeline.base.errors import UserError

T = TypeVar("T")


def hint(word: str, known: Iterable[str], most: int = 8) -> str:
    """ "did you mean 'fc1.weight'? known: …", with at most `most` known names and a count of the rest."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    near = near or [name for name in names if word and name.startswith(word)]
    question = f"did you mean '{near[0]}'? " if near else ""
    return f"{question}known: {few(names, most)}"


def few(items: Iterable[str], most: int = 8) -> str:
    """The items joined by commas; after `most` of them, how many more there are."""
    listed = list(items)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def lookup(table: Mapping[str, T], name: str, setting: str) -> T:
    """table[name]. Raises UserError that names the setting and lists the known names."""
    if name not in table:
        raise UserError(f"{setting}='{name}' is unknown; {hint(name, table, most=20)}")
    return table[name]
