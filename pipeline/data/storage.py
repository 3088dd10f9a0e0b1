"""Files by path or URL; the one module that knows where bytes live.

Today that is the local file system (a path or a file:// URL). Everything else in secateur reads and
writes through these functions, so another store is added here and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from pipeline.errors import UserError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_BUFFER = 2**20  # bytes; a local file is read in pieces of this size
_HASH_PIECE = 2**22
_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{12}\.tmp$")


def local_path(url: str | Path) -> Path:
    """The path behind a plain path or a file:// URL. Raises UserError for any other scheme."""
    text = str(url)
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"'{text}' names the host '{parts.netloc}': write file:///absolute/path")
        return Path(unquote(parts.path))
    scheme = _SCHEME.match(text)
    if text.startswith("pipe:"):
        raise UserError(f"'{text}' would run a shell command, which secateur never does: give a path")
    if scheme is not None and not Path(text).exists():
        raise UserError(f"'{text}': scheme '{scheme[1]}' is not supported: give a local path or a file:// URL")
    return Path(text)


def join(*parts: str) -> str:
    """Parts of a path or URL joined by single slashes; the first keeps its leading slash or scheme."""
    assert parts
    kept = [part for part in parts if part]
    if not kept:
        return ""
    head = kept[0].rstrip("/") or "/"
    tail = "/".join(part.strip("/") for part in kept[1:])
    return head if not tail else f"{head.rstrip('/')}/{tail}"


def exists(url: str | Path) -> bool:
    """Whether a file is there (a folder is not a file)."""
    return local_path(url).is_file()


def size(url: str | Path) -> int:
    """Bytes in a file. Raises FileNotFoundError."""
    return local_path(url).stat().st_size


def read_bytes(url: str | Path) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    return local_path(url).read_bytes()


def read_json(url: str | Path) -> Any:
    """A JSON file's value. Raises FileNotFoundError, or UserError where it is not valid JSON."""
    try:
        return json.loads(read_bytes(url))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"'{url}' is not valid JSON ({error}): restore it, or delete it and make it again") from error


def write_bytes(url: str | Path, data: bytes) -> None:
    """Write a whole file; a reader sees the old one or the new one, never a part. UserError if the disk is full."""
    with create(url) as stream:
        stream.write(data)


def write_json(url: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically. NaN and infinity are our mistake: ValueError."""
    write_bytes(url, (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def create(url: str | Path) -> Iterator[BinaryIO]:
    """A stream to a new file that takes its name only when the block ends well. UserError if the disk is full."""
    with atomic_path(url) as temporary, temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` on success and removed on failure.

    Folders above it are made. Raises UserError where the disk is full.
    """
    final = local_path(path)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, final)
        _sync(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left to write '{final}': free space on that disk (or move the folder to a larger one), "
                "then run the same command again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(url: str | Path) -> None:
    """Delete a file; nothing happens if it is not there."""
    local_path(url).unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed writer left in a folder."""
    path = local_path(folder)
    for name in os.listdir(path) if path.is_dir() else []:
        if _TEMPORARY.match(name):
            (path / name).unlink(missing_ok=True)


def list_files(url: str | Path) -> list[str]:
    """Names of the files directly in a folder, sorted, hidden ones left out; empty if there is no such folder."""
    folder = local_path(url)
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))


def sha256(url: str | Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises FileNotFoundError."""
    digest = hashlib.sha256()
    with local_path(url).open("rb") as stream:
        while piece := stream.read(_HASH_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def open_range(url: str | Path, start: int = 0, stop: int | None = None) -> BinaryIO:
    """A stream of the bytes from `start` up to `stop` (None: the end). Raises FileNotFoundError."""
    assert start >= 0, start
    assert stop is None or stop >= start, (start, stop)
    return cast(BinaryIO, io.BufferedReader(_Range(local_path(url), start, stop), _BUFFER))


class _Range(io.RawIOBase):
    """Part of a local file, read forward."""

    def __init__(self, path: Path, start: int, stop: int | None) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(start)
        self._left = None if stop is None else stop - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._left is not None:
            view = view[: self._left]
        count = self._file.readinto(view) if len(view) else 0
        if self._left is not None:
            self._left -= count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
