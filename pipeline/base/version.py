"""Which version of secateur this is. pyproject.toml reads it from here."""

VERSION = "0.2.0"
