"""Files on this machine, or on a mounted file system."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from pipeline.base.errors import UserError
from pipeline.storage.retry import Check
from pipeline.storage.stat import Stat

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
_BUFFER = 2**20  # bytes; a local file is read in pieces of this size
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
        raise UserError(f"'{text}': scheme '{scheme[1]}' cannot be used here: give a local path or a file:// URL")
    return Path(text)


def stat(url: str | Path) -> Stat | None:
    """What is known of a file, or None where there is none (a folder is not a file)."""
    path = local_path(url)
    return _stat(path.stat()) if path.is_file() else None


def _stat(found: os.stat_result) -> Stat:
    return Stat(found.st_size, f"{found.st_mtime_ns}-{found.st_ino}")


def stats(folder: str | Path) -> dict[str, Stat]:
    """The files directly in a folder."""
    path = local_path(folder)
    found = {}
    for entry in os.scandir(path) if path.is_dir() else ():
        # A file that was replaced or deleted since the listing is left out; the next look sees it.
        with contextlib.suppress(FileNotFoundError):
            if entry.is_file():
                found[entry.name] = _stat(entry.stat())
    return found


def folders(folder: str | Path) -> list[str]:
    """Names of the folders directly in a folder."""
    path = local_path(folder)
    return [entry.name for entry in os.scandir(path) if entry.is_dir()] if path.is_dir() else []


def require_inside(folder: str | Path, names: Iterable[str]) -> None:
    """Raise UserError where a file within a folder, by its path from there, lies elsewhere by a link."""
    root = local_path(folder)
    real = os.path.realpath(root)
    for name in names:
        try:
            place = os.path.realpath(root / name, strict=True)
        except FileNotFoundError:
            place = os.path.realpath(root / name)
        except OSError as error:
            raise UserError(f"'{root / name}' cannot be followed ({error.strerror}): remove it") from error
        if not Path(place).is_relative_to(real):
            raise UserError(
                f"'{root / name}' leads out of its folder, to '{place}': put what is meant in its place, or remove it"
            )


def require_closed(folder: str | Path) -> None:
    """Raise UserError where anything at any depth of a folder is a link out of it, or neither file nor folder."""
    root, ahead = local_path(folder), [""]
    while ahead:
        within = ahead.pop()
        for entry in os.scandir(root / within):
            name = os.path.join(within, entry.name)
            if entry.is_symlink():
                require_inside(root, [name])
            elif entry.is_dir(follow_symlinks=False):
                ahead.append(name)
            elif not entry.is_file(follow_symlinks=False):
                raise UserError(
                    f"'{root / name}' is neither a file nor a folder, and reading it may not end: remove it"
                )


def read(url: str | Path) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    return local_path(url).read_bytes()


def write(url: str | Path, data: bytes, check: Check | None = None) -> None:
    """Write a whole file atomically."""
    with create(url, None, check) as stream:
        stream.write(data)


@contextlib.contextmanager
def create(url: str | Path, sha256: str | None = None, check: Check | None = None) -> Iterator[BinaryIO]:
    """A stream to a new file that takes its name only when the block ends well. UserError if the disk is full."""
    with atomic_path(url, check) as temporary, temporary.open("wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())


class Appending:
    """A file that is written at its end only. What `write` was given outlives the process, but not a power cut.

    What was given before `sync` outlives a power cut too. Raises DiskFull where there is no room.
    """

    def __init__(self, url: str | Path) -> None:
        self._path = local_path(url)
        with room(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            _sync(self._path.parent)

    def write(self, data: bytes) -> None:
        """Write bytes at the end; all of them have been handed to the system when this returns."""
        left = memoryview(data)
        with room(self._path):
            while left:
                left = left[self._file.write(left) :]

    def sync(self) -> None:
        """Have the disk write everything down."""
        with room(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DiskFull(UserError):
    """No space is left on a disk, or none for this user."""


@contextlib.contextmanager
def room(path: Path) -> Iterator[None]:
    """Raise DiskFull where the block finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left to write '{path}': free space on that disk (or move the folder to a larger one), "
                "then run the same command again"
            ) from error
        raise


@contextlib.contextmanager
def atomic_path(path: str | Path, check: Check | None = None) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` on success and removed on failure.

    Folders above it are made. `check` is called first, and again before the file takes its name. Raises DiskFull where
    there is no room.
    """
    final = local_path(path)
    if check is not None:
        check()
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with room(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            if check is not None:
                check()
            os.replace(temporary, final)
            _sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(url: str | Path, check: Check | None = None) -> None:
    """Delete a file; nothing happens if it is not there."""
    if check is not None:
        check()
    local_path(url).unlink(missing_ok=True)


def remove_tree(folder: str | Path, check: Check | None = None) -> None:
    """Delete a folder and all that is in it; nothing happens if it is not there."""
    path = local_path(folder)
    if check is not None:
        check()
    if path.is_dir():
        shutil.rmtree(path)


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed writer left in a folder, at any depth."""
    for parent, _, names in os.walk(local_path(folder)):
        for name in filter(_TEMPORARY.match, names):
            Path(parent, name).unlink(missing_ok=True)


def open_range(url: str | Path, start: int, stop: int | None, version: str | None) -> BinaryIO:
    """A stream of the bytes from `start` up to `stop` (None: the end). Raises FileNotFoundError."""
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
