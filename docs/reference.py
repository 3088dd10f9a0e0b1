"""The reference, from the code: settings and result.json from their schemas, commands from their parsers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "pipeline/settings/schema.json"
RESULT = ROOT / "pipeline/results/result.schema.json"
WIDTH = 100  # columns of a command's help
PYTHON = "# Python\n\n::: secateur\n"  # mkdocstrings does the rest
KINDS = {"integer": "whole number", "string": "text", "boolean": "true or false", "number": "number", "null": "null"}
Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """The text of each page by its name."""
    return {"settings": settings(), "commands": commands(), "result": result(), "python": PYTHON}


def settings() -> str:
    """Every setting, a table a section."""
    schema = json.loads(SETTINGS.read_text())
    top = {name: field for name, field in schema["properties"].items() if "$ref" not in field}
    lines = [
        "# Settings", "",
        "A config is a YAML file of these; on the command line each is `section.name=value`. Editors that know JSON "
        "Schema complete them from `pipeline/settings/schema.json`, and so does this page.", "",
        "## The run itself", "", *_settings("", top, schema["required"]),
    ]  # fmt: skip
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = _section(field, schema)
            lines += [f"## {name}", "", _plain(field.get("description") or section["description"]), ""]
            lines += _settings(f"{name}.", section["properties"], section.get("required", []))
    return "\n".join(lines)


def _settings(prefix: str, fields: dict[str, Schema], required: list[str]) -> Iterator[str]:
    yield "| setting | default | may be | what it does |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        default = "must be given" if name in required else _code(_default(field))
        yield f"| `{prefix}{name}` | {default} | {_allowed(field)} | {_plain(field['description'])} |"
    yield ""


def _default(field: Schema) -> str:
    if "default" not in field:
        return "{}" if field.get("type") == "object" else "null"
    value = field["default"]
    return value if isinstance(value, str) else json.dumps(value)


def result() -> str:
    """Every field of result.json, a table a part."""
    schema = json.loads(RESULT.read_text())
    lines = [
        "# result.json",
        "",
        "What a finished run leaves for scripts. Accuracies and drops are fractions in 0..1.",
        "",
    ]
    lines += _fields(schema)
    for name, part in schema["$defs"].items():
        lines += [f"## {name}", "", _plain(part.get("description", "")), "", *_fields(part)]
    return "\n".join(lines)


def _fields(part: Schema) -> Iterator[str]:
    yield "| field | is | meaning |"
    yield "|---|---|---|"
    for name, field in part.get("properties", {}).items():
        yield f"| `{name}` | {_allowed(field)} | {_plain(field.get('description', ''))} |"
    yield ""


def _section(field: Schema, schema: Schema) -> Schema:
    found: Schema = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return found


def _allowed(field: Schema) -> str:
    """What may stand there, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_allowed(part) for part in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(_code(json.dumps(value).strip('"')) for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        pair = field.get("prefixItems")
        return f"list of {len(pair)}: {_allowed(pair[0])}" if pair else f"list of {_allowed(field['items'])}"
    if kind == "object":
        values = field.get("additionalProperties")
        return f"mapping to {_allowed(values)}" if isinstance(values, dict) else "mapping"
    return f"{KINDS.get(str(kind), 'anything')}{_bounds(field)}"


def _bounds(field: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign}&nbsp;{_number(field[key])}" for key, sign in signs.items() if key in field]
    return f" {', '.join(found)}" if found else ""


def _number(value: float) -> str:
    return f"{value:,}" if value == int(value) and abs(value) <= 2**32 else f"{value:.3g}"


def commands() -> str:
    """Every command's help, of `secateur` and of `python -m pipeline`."""
    from cluster.cli import app as with_ray
    from pipeline.__main__ import app as without_ray

    ours, theirs = (dict(_leaves(typer.main.get_command(app))) for app in (with_ray, without_ray))
    lines = [
        "# Commands", "",
        "`secateur` has them all. `python -m pipeline` has the same but for those marked *needs Ray*, and runs without "
        "Ray. Exit codes are on the page [Operations](../operations.md).", "",
    ]  # fmt: skip
    for name, command in ours.items():
        context = typer.Context(command, info_name=f"secateur {name}", terminal_width=WIDTH, max_content_width=WIDTH)
        mark = "" if name in theirs else "*Needs Ray.*"
        lines += [f"## {name}", "", mark, "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


def _leaves(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Commands by their whole names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "&#124;")


def _plain(text: str) -> str:
    """A sentence as Markdown within a table, nothing in it taken for markup."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))
