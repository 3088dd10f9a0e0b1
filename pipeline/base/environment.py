"""Numbers that a user may set as environment variables."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

from pipeline.base.errors import UserError


def number(name: str, default: float) -> float:
    """The variable `name`, or `default`. Raises UserError where it is no finite number from 0 up."""
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name}={text} is not a number from 0 up: set it as in {name}={default:g}, or unset it")
    return value


def processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    return " ".join(named.split()) or platform.machine()
