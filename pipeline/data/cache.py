"""Shards from a URL, kept on a node's own disk: whole, checked, and shared by all processes of the node.

An entry is named after the whole URL and the version (ETag), so that shards of the same name, or an old and a new
version, are never confused. A file gets this name once its size and SHA-256 match the manifest. Each process checks an
entry once more before its first use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline import storage
from pipeline.base.errors import UserError

_checked: set[tuple[str, int]] = set()  # path and inode of the entries that this process has checked
_ABANDONED_NS = 600 * 10**9  # a fetch that has written nothing for so long was killed


@dataclass(frozen=True)
class Entry:
    """A shard as it should be."""

    url: str
    version: str
    bytes: int
    sha256: str


class Cache:
    """Entries in `folder`, at most `limit` bytes in all, and no more than its disk has room for.

    The least recently used entries are removed first.
    """

    def __init__(self, folder: str, limit: int, entries: Iterable[Entry]) -> None:
        self.folder, self.limit = Path(folder), limit
        self.entries = {entry.url: entry for entry in entries}

    def open(self, url: str, start: int, stop: int | None) -> BinaryIO | None:
        """Bytes of the local copy of a shard, fetched if it is not there; None where it cannot be kept.

        A shard cannot be kept if it has no version, is larger than the limit, or finds the disk full: this is said in a
        warning.

        Raises UserError where the shard is not what the manifest says, or the folder cannot be written.
        """
        entry = self.entries[url]
        if not entry.version or entry.bytes > self.limit:
            return None
        name = hashlib.sha256(f"{entry.url}\n{entry.version}".encode()).hexdigest()
        while True:
            target = self._entry(entry, name)
            if target is None:
                warnings.warn(
                    f"data.cache_dir={self.folder}: its disk is full. What does not fit is read from its URL each "
                    "time: free space there, or name a folder on a larger disk",
                    stacklevel=2,
                )
                return None
            with contextlib.suppress(FileNotFoundError):  # another process has made room in between
                return storage.open_range(target, start, stop)

    def _entry(self, entry: Entry, name: str) -> Path | None:
        target = self.folder / f"{name}.tar"
        try:
            with storage.room(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(f"{name}.lock"):  # one process fetches, the others wait for it
                if not _sound(target, entry):
                    target.unlink(missing_ok=True)
                    if not self._make_room(entry.bytes):
                        return None
                    storage.copy(entry.url, str(target), entry.sha256, entry.version)
                    _remember(target)
                    self._make_room(0)  # others may have fetched at the same time
                now = time.time_ns()  # the kernel's own clock for this is coarse
                with contextlib.suppress(FileNotFoundError):
                    os.utime(target, ns=(now, now))
        except storage.DiskFull:
            return None
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"data.cache_dir={self.folder} cannot be used: {error.strerror}") from error
        return target

    def _make_room(self, needed: int) -> bool:
        """Remove the least recently used entries, so that `needed` bytes more fit; whether the disk has them.

        A process can still read a removed entry.
        """
        with self._lock("lock"):
            files = []
            for file in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    files.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
            old = time.time_ns() - _ABANDONED_NS
            abandoned = [file for file in files if file[2].endswith(".tmp") and file[0] < old]
            total = sum(size for _, size, _ in files)
            limit = min(self.limit, total + shutil.disk_usage(self.folder).free)
            total += needed
            for _, size, path in abandoned + sorted(file for file in files if file[2].endswith(".tar")):
                if total <= limit:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size
        return shutil.disk_usage(self.folder).free >= needed

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return storage.locked(self.folder / name, f"data.cache_dir={self.folder}", wait=True)


def _remember(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process has made room
        _checked.add((str(path), path.stat().st_ino))


def _sound(path: Path, entry: Entry) -> bool:
    """Whether an entry is there and whole; hashed once by each process."""
    try:
        found = path.stat()
        if found.st_size != entry.bytes:
            return False
        if (str(path), found.st_ino) not in _checked:
            if storage.sha256(path) != entry.sha256:
                warnings.warn(f"data.cache_dir: '{path}' is damaged; '{entry.url}' is fetched again", stacklevel=2)
                return False
            _remember(path)
    except FileNotFoundError:
        return False
    return True
