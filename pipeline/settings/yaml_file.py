"""From a YAML file and `a.b=c` overrides to a plain tree, with bounds on size and depth."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.settings.base import short

MOST_BYTES = 2**20
MOST_VALUES = 20_000  # with aliases expanded
MOST_DEPTH = 30
# The loader of OmegaConf. The one in pure Python takes no '?' within brackets, which a URL may have.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What YAML's reader and OmegaConf are known to raise on a text that is no config, besides their own errors: for a date
# or number that does not fit its tag, an invalid index, or endless brackets.
_MISTAKES = (
    yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
    OverflowError, RecursionError, NotImplementedError,
)  # fmt: skip


_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_MARKS = re.compile(r"(?P<escapes>\\*)(?P<open>\$\{)|[:}]")  # of an interpolation: ${, : and }


def read_tree(path: str | Path, overrides: list[str]) -> Any:
    """The settings of a file with the overrides merged in and interpolations (${seed}) resolved, not yet validated.

    Raises UserError for a text that is no mapping of plain values, for overrides that are not key=value, for an
    interpolation that calls a resolver (${oc.env:HOME}), and for a text that is too large, too deep or, with its
    aliases expanded, too long.
    """
    text = _text(path)
    try:
        document = yaml.compose(text, Loader=_LOADER)
        _require_small(document)
        _require_no_resolver(document, f"config '{path}'")
        tree: Any = OmegaConf.create(_with_texts(text, document))
    except _MISTAKES as error:
        raise UserError(f"config '{path}' is not valid YAML: {_one_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"config '{path}' must be a mapping of settings (name: ..., data: ...), not a list")
    for override in overrides:
        tree = _merged(tree, override)
    try:
        return OmegaConf.to_container(tree, resolve=True)
    except _MISTAKES as error:
        raise UserError(f"config '{path}': {_one_line(error)}") from error


def _merged(tree: DictConfig, override: str) -> Any:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise UserError(f"override '{override}' is not of the form key=value, as in cluster.workers=2")
    if not all(key.split(".")):
        raise UserError(f"override '{override[:200]}' has an empty name beside a dot: write it as in cluster.workers=2")
    try:
        if key.count(".") > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels of settings")
        document = yaml.compose(value, Loader=_LOADER)
        _require_small(document)
        _require_no_resolver(document, f"override '{override[:200]}'")
        return OmegaConf.merge(tree, OmegaConf.from_dotlist([f"{key}={_with_texts(value, document)}"]))
    except _MISTAKES as error:
        raise UserError(f"override '{override[:200]}' cannot be read: {_one_line(error)}") from error


def _text(path: str | Path) -> str:
    """The text of a config file. Raises UserError if it is missing, too large, or not UTF-8."""
    local = storage.is_local(path)
    file = storage.local_path(path) if local else None
    if file is not None and not _is_file(file):
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise UserError(f"config '{path}' does not exist{hint}")
    try:
        with storage.open_range(path, 0, MOST_BYTES + 1) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise UserError(f"config '{path}' does not exist: check the URL") from error
    if len(data) > MOST_BYTES:
        raise UserError(f"config '{path}' has more than {MOST_BYTES:,} bytes: is it a config?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"config '{path}' is not valid YAML: it is not UTF-8 ({error})") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for any file
        return False


def _require_small(root: yaml.Node | None) -> None:
    """Raise ValueError if a document is too deep or, with its aliases expanded, too long for a config."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MOST_DEPTH:
            raise ValueError(f"it is more than {MOST_DEPTH} levels deep (or an alias stands within itself)")
        if id(node) not in sizes:
            parts: list[Any] = []
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        if sizes[id(node)] > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, aliases written out")
        return sizes[id(node)]

    if root is not None:
        size(root, 0)


def _with_texts(text: str, root: yaml.Node | None) -> str:
    """The text of a document, with numbers of base 60 in quotes: YAML 1.1 reads 2:4 as 124, and nobody means that."""
    spans, ahead, seen = set[tuple[int, int]](), [root], set[int]()
    while ahead:
        node = ahead.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and not node.style and _BASE_60.fullmatch(node.value):
            spans.add((node.start_mark.index, node.end_mark.index))
        elif isinstance(node, yaml.SequenceNode):
            ahead += node.value
        elif isinstance(node, yaml.MappingNode):
            ahead += [part for pair in node.value for part in pair]
    for start, end in sorted(spans, reverse=True):
        written = text[start:end]
        if "!" not in written:  # with a tag of its own it means that; an anchor may stand before it
            anchor, space, number = written.rpartition(" ")
            text = f"{text[:start]}{anchor}{space}'{number}'{text[end:]}"
    return text


def _require_no_resolver(root: yaml.Node | None, origin: str) -> None:
    """UserError where a text of a document would call a resolver of OmegaConf, before any is called."""
    ahead, seen = [("", root)], set[int]()
    while ahead:
        where, node = ahead.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and _calls_resolver(node.value):
            raise UserError(
                f"{origin}: {where}{short(node.value)} calls a resolver (a name and a colon after '${{'), which could "
                "read this machine's environment: write the value itself, or give it as KEY=VALUE on the command line"
            )
        if isinstance(node, yaml.SequenceNode):
            ahead += [(where, part) for part in node.value]
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                ahead += [(where, key), (f"{where.removesuffix('=')}{'.' if where else ''}{key.value}=", value)]


def _calls_resolver(text: str) -> bool:
    """Whether an interpolation in a text holds a colon, as in ${oc.env:HOME}; ${seed} names a setting and does not."""
    depth = 0
    for mark in _MARKS.finditer(text):
        if mark["open"] and (depth or len(mark["escapes"]) % 2 == 0):  # \\${ is no interpolation
            depth += 1
        elif depth and mark[0] == "}":
            depth -= 1
        elif depth and mark[0] == ":":
            return True
    return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
