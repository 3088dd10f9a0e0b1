"""Files by path or URL; the one package that knows where bytes live.

A path or file:// URL, s3://bucket/key, or, to be read only, http(s)://. Everything else in secateur reads
and writes through these functions, so another store is added here and nowhere else. What writes takes a `check`: it is
called before each try, also before one that is made minutes later, and what it raises ends the write.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from pipeline.base.errors import UserError
from pipeline.storage import local, retry
from pipeline.storage.local import Appending, DiskFull, local_path, room
from pipeline.storage.locks import LockedByAnother, locked
from pipeline.storage.retry import Check
from pipeline.storage.stat import NoAccess, Stat, Versioned

__all__ = [
    "Appending", "Check", "DiskFull", "LockedByAnother", "NoAccess", "Stat", "Versioned", "local_path", "locked",
    "room",
]  # fmt: skip

_PIECE = 2**22  # bytes hashed or copied at a time
_AT_ONCE = 32  # requests for files that cannot be listed
_LIST_FROM = 8  # files from which one listing of their folder is quicker than a look at each


class _Store(Protocol):
    """What each kind of store can do. Whether a path is a URL is settled before."""

    def stat(self, url: str, /) -> Stat | None: ...
    def stats(self, folder: str, /) -> dict[str, Stat]: ...
    def folders(self, folder: str, /) -> Iterable[str]: ...
    def read(self, url: str, /) -> bytes: ...
    def write(self, url: str, data: bytes, check: Check | None, /) -> None: ...
    def create(self, url: str, sha256: str | None, check: Check | None, /) -> AbstractContextManager[BinaryIO]: ...
    def remove(self, url: str, check: Check | None, /) -> None: ...
    def remove_tree(self, folder: str, check: Check | None, /) -> None: ...
    def remove_leftovers(self, folder: str, /) -> None: ...
    def open_range(self, url: str, start: int, stop: int | None, version: str | None, /) -> BinaryIO: ...


def _store(url: str | Path) -> _Store:
    """The store of a URL, imported when it is first met: boto3 takes a moment."""
    if is_s3(url):
        from pipeline.storage import s3

        return s3
    if str(url).startswith(("http://", "https://")):
        from pipeline.storage import http

        return http
    return local


def is_s3(url: str | Path) -> bool:
    """Whether a URL is of S3."""
    return str(url).startswith("s3://")


def is_local(url: str | Path) -> bool:
    """Whether a path or URL is of this machine's file systems."""
    return _store(url) is local


def join(*parts: str | Path) -> str:
    """Parts of a path or URL joined by single slashes; the first keeps its leading slash or scheme."""
    assert parts
    kept = [str(part) for part in parts if str(part)]
    if not kept:
        return ""
    head = kept[0].rstrip("/") or "/"
    tail = "/".join(part.strip("/") for part in kept[1:])
    return head if not tail else f"{head.rstrip('/')}/{tail}"


def stat(url: str | Path) -> Stat | None:
    """Size and version of a file, or None where there is none (a folder is not a file)."""
    return _store(url).stat(str(url))


def exists(url: str | Path) -> bool:
    """Whether a file is there (a folder is not a file)."""
    return stat(url) is not None


def size(url: str | Path) -> int:
    """Bytes in a file. Raises FileNotFoundError."""
    found = stat(url)
    if found is None:
        raise FileNotFoundError(f"'{url}' does not exist")
    return found.bytes


def stats(folder: str | Path) -> dict[str, Stat]:
    """The files directly in a folder, sorted, hidden ones left out; empty if there is no such folder."""
    found = _store(folder).stats(str(folder))
    return {name: found[name] for name in sorted(found) if not name.startswith(".")}


def stats_of(folder: str, names: list[str]) -> dict[str, Stat]:
    """The named files that exist in a folder. Lists the folder once, or asks side by side, where that saves time."""
    if is_s3(folder) and len(names) >= _LIST_FROM:
        found = stats(folder)
        return {name: found[name] for name in names if name in found}
    places = [join(folder, name) for name in names]
    if is_local(folder):
        found_each = [*map(stat, places)]
    else:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="secateur-stat") as pool:
            found_each = [*pool.map(stat, places)]
    return {name: known for name, known in zip(names, found_each, strict=True) if known is not None}


def list_files(folder: str | Path) -> list[str]:
    """Names of the files directly in a folder, sorted, hidden ones left out; empty if there is no such folder."""
    return list(stats(folder))


def list_folders(folder: str | Path) -> list[str]:
    """Names of the folders directly in a folder, sorted; empty if there is no such folder."""
    return sorted(_store(folder).folders(str(folder)))


def require_inside(folder: str | Path, names: Iterable[str]) -> None:
    """Raise UserError where a file within a folder, by its path from there, lies elsewhere by a link."""
    if is_local(folder):
        local.require_inside(folder, names)


def require_closed(folder: str | Path) -> None:
    """Raise UserError where anything at any depth of a folder is a link out of it, or neither file nor folder.

    Stores other than this machine's file systems have no links.
    """
    if is_local(folder):
        local.require_closed(folder)


def read_bytes(url: str | Path) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    return _store(url).read(str(url))


def read_json(url: str | Path) -> Any:
    """A JSON file's value. Raises FileNotFoundError, or UserError where it is not valid JSON."""
    return parse_json(read_bytes(url), url)


def parse_json(data: bytes, url: str | Path) -> Any:
    """The value of a JSON file that was read from `url`. Raises UserError where it is not valid JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise UserError(f"'{url}' is not valid JSON ({error}): restore it, or delete it and make it again") from error


def write_bytes(url: str | Path, data: bytes, check: Check | None = None) -> None:
    """Write a whole file; a reader sees the old one or the new one, never a part. UserError if the disk is full."""
    _store(url).write(str(url), data, check)


def write_json(url: str | Path, value: Any, check: Check | None = None) -> None:
    """Write a value as indented JSON, atomically. NaN and infinity are our mistake: ValueError."""
    write_bytes(url, as_json(value), check)


def as_json(value: Any) -> bytes:
    """A value as indented JSON. NaN and infinity are our mistake: ValueError."""
    return (json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def appending(url: str | Path) -> Appending:
    """A file of this machine's file systems that is written at its end only. Folders above it are made.

    Stores such as S3 cannot append. Raises UserError if the disk is full.
    """
    assert is_local(url), url
    return Appending(url)


def create(url: str | Path, sha256: str | None = None, check: Check | None = None) -> AbstractContextManager[BinaryIO]:
    """A stream to a new file that takes its name only when the block ends well. UserError if the disk is full.

    It is written forward only. `sha256` is noted with the file where the store can (`Stat.sha256`).
    """
    return _store(url).create(str(url), sha256, check)


@contextlib.contextmanager
def atomic_path(url: str | Path, check: Check | None = None) -> Iterator[Path]:
    """A temporary local path whose file becomes `url` on success and is removed on failure.

    Folders above it are made. Raises UserError where the disk is full.
    """
    if is_local(url):
        with local.atomic_path(url, check) as path:
            yield path
        return
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder, PurePosixPath(str(url)).name)
        yield path
        with path.open("rb") as source, create(url, check=check) as target:
            shutil.copyfileobj(source, target, _PIECE)


@contextlib.contextmanager
def local_copy(url: str | Path) -> Iterator[Path]:
    """The file itself where it is local, else a copy that is gone after the block. Raises FileNotFoundError."""
    if is_local(url):
        yield local_path(url)
        return
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        path = Path(folder, PurePosixPath(str(url)).name)
        copy(str(url), str(path))
        yield path


def copy(source: str, target: str, sha256: str | None = None, version: str | None = None) -> None:
    """Copy a file. Raises UserError, and leaves no copy, where its SHA-256 is not `sha256` or the disk is full."""
    digest = hashlib.sha256()
    with open_range(source, version=version) as stream, create(target, sha256) as out:
        while piece := stream.read(_PIECE):
            digest.update(piece)
            out.write(piece)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise UserError(f"'{source}' has another SHA-256 than it should: restore it, or make it again")


def read_versioned(url: str) -> Versioned | None:
    """A small file on S3 with its version and age, or None where there is none."""
    from pipeline.storage import s3

    try:
        return s3.read_versioned(_conditional(url))
    except FileNotFoundError:
        return None


def put_if(
    url: str, data: bytes, version: str | None, check: Check | None = None,
    longest_wait_s: float = retry.LONGEST_WAIT_S,
) -> str | None:  # fmt: skip
    """Write a file on S3 if it still has that version (None: if it does not exist). Returns the new version, or None.

    `data` must differ from what anybody else writes there. Between two tries at most `longest_wait_s` pass.
    """
    from pipeline.storage import s3

    return s3.put_if(_conditional(url), data, version, check, longest_wait_s)


def ignored_conditions(folder: str) -> list[str]:
    """Which of If-None-Match and If-Match the S3 store of a folder does not heed: `put_if` would then not be safe."""
    from pipeline.storage import s3

    return s3.ignored_conditions(_conditional(folder))


def _conditional(url: str) -> str:
    if not is_s3(url):
        raise UserError(f"'{url}' cannot be written: give a path, or a URL s3://bucket/key")
    return url


def remove(url: str | Path, check: Check | None = None) -> None:
    """Delete a file; nothing happens if it is not there."""
    _store(url).remove(str(url), check)


def remove_tree(folder: str | Path, check: Check | None = None) -> None:
    """Delete a folder and all that is in it; nothing happens if it is not there."""
    _store(folder).remove_tree(str(folder), check)


def remove_leftovers(folder: str | Path) -> None:
    """Delete what a killed writer left in a folder, at any depth: temporary files; on S3 unfinished uploads."""
    _store(folder).remove_leftovers(str(folder))


def sha256(url: str | Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises FileNotFoundError."""
    digest = hashlib.sha256()
    with open_range(url) as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def open_range(url: str | Path, start: int = 0, stop: int | None = None, version: str | None = None) -> BinaryIO:
    """A stream of the bytes from `start` up to `stop` (None: the end). Raises FileNotFoundError.

    Raises UserError where a remote file changes: its version must stay `version`, or by default the first answer's.
    """
    assert start >= 0, start
    assert stop is None or stop >= start, (start, stop)
    return _store(url).open_range(str(url), start, stop, version)


def retries() -> Counter[str]:
    """How many retries this process has made, by the name of the error."""
    return Counter(retry.counts)
