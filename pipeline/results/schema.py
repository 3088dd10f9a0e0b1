"""The contract of result.json, as a JSON Schema beside this file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = Path(__file__).with_name("result.schema.json")


@cache
def _validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def validate(result: dict[str, Any]) -> None:
    """Check a result against the contract. Raises ValueError that lists every place that breaks it."""
    problems = sorted(_validator().iter_errors(result), key=lambda error: [str(part) for part in error.absolute_path])
    if problems:
        lines = [f"{'/'.join(str(p) for p in error.absolute_path) or '(top)'}: {error.message}" for error in problems]
        raise ValueError("result.json breaks its contract: " + "; ".join(lines))
