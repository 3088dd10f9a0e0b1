"""Files that MLflow should hold: those of a run's folder, and those that are made from it when they are needed."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import storage
from pipeline.base.record import plain
from pipeline.run.records import LayerCount
from pipeline.run.result import LayerResult

# Raised when a figure or table is drawn differently, so that those already in MLflow are replaced.
_DRAWN = b"2"


@dataclass(frozen=True)
class Artifact:
    """A file by its place in MLflow; `digest` tells whether MLflow has it, `open` gives its bytes' place on disk."""

    path: str
    digest: str
    open: Callable[[Path], Path] = field(compare=False)


def of_file(path: str, url: str, version: str) -> Artifact:
    """A file of the run's folder, which lies at `url`."""
    return Artifact(path, _file_digest(url, version), partial(_fetch, url))


def known_as(path: str, url: str, identity: str) -> Artifact:
    """A file at `url` that never changes, by an identity that the run gives it: it is not read to be told apart."""
    return Artifact(path, hashlib.sha256(identity.encode()).hexdigest(), partial(_fetch, url))


def table(path: str, rows: Sequence[LayerResult] | Sequence[LayerCount]) -> Artifact:
    """A table in the form that MLflow's page shows: pandas' "split" JSON, columns and rows apart."""
    plain_rows = [plain(row) for row in rows]
    columns = list(plain_rows[0]) if plain_rows else []
    text = json.dumps({"columns": columns, "data": [list(row.values()) for row in plain_rows]})
    return _generated(path, text.encode(), lambda: text.encode())


def figure(name: str, basis: Any, draw: Callable[[], bytes]) -> Artifact:
    """A PNG, drawn when it is needed; `basis` is what it shows."""
    return _generated(f"figures/{name}.png", json.dumps(plain(basis), sort_keys=True).encode(), draw)


def safe(name: str) -> str:
    """A name in the characters that are fit for a file's name and for MLflow's models."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:120]


def _generated(path: str, basis: bytes, make: Callable[[], bytes]) -> Artifact:
    """An artifact that is made when it is needed; its digest is that of what it is made from."""

    def write(folder: Path) -> Path:
        target = Path(tempfile.mkdtemp(dir=folder)) / Path(path).name
        target.write_bytes(make())
        return target

    return Artifact(path, hashlib.sha256(_DRAWN + basis).hexdigest(), write)


def _fetch(url: str, folder: Path) -> Path:
    if storage.is_local(url):
        return storage.local_path(url)
    target = Path(tempfile.mkdtemp(dir=folder), PurePosixPath(url).name)
    storage.copy(url, str(target))
    return target


@lru_cache(maxsize=256)
def _file_digest(url: str, version: str) -> str:
    """SHA-256 of a local file. The version is the cache's key, so that a large model is not read again each time.

    On S3, the SHA-256 of the version, which identifies the content without a download.
    """
    return storage.sha256(url) if storage.is_local(url) else hashlib.sha256(version.encode()).hexdigest()
