"""What is known of a file without reading it, or why nothing can be."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.base.errors import UserError


class NoAccess(UserError):
    """This process may not use a store: it has no credentials, or none that the store accepts for this."""


class Stat(NamedTuple):
    """Bytes; a version that changes when the file does; the SHA-256 that its writer noted, where one did."""

    bytes: int
    version: str
    sha256: str | None = None


class Versioned(NamedTuple):
    """An object's bytes, its version, and seconds since it was written by the store's own clock."""

    data: bytes
    version: str
    age_s: float
