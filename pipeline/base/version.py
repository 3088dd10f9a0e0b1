"""Which version of secateur this is."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """As in 0.1.0; `unknown` where the code runs without being installed."""
    try:
        return metadata.version("secateur")
    except metadata.PackageNotFoundError:
        return "unknown"
