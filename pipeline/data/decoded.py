"""Decoded images of a split on a node's own disk, for networks that outrun any decoder: mapped into memory, checked.

A split is two files: `NAME.pixels`, the images one after the other, and `NAME.npy`, written last, which says where each
of them is. The name stands for the data, the settings that make pixels, and the versions of what decodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data.decoder import Pixels

_ROW = np.dtype([("at", "<u8"), ("height", "<u4"), ("width", "<u4"), ("crc32", "<u4"), ("good", "u1")])
_DECODERS = ("pillow", "simplejpeg", "torch")


class Decoded:
    """The images of a split, (H, W, channels) by number; each is checked when this process first asks for it.

    `good` is false for images that cannot be read, which are zeros.
    """

    def __init__(self, file: Path, index: NDArray[Any], channels: int) -> None:
        self._file, self._index, self._channels = file, index, channels
        self._pixels = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
        self._checked = np.zeros(len(index), np.bool_)
        self.good: NDArray[np.bool_] = index["good"] > 0

    def __getitem__(self, number: int) -> Pixels:
        """An image. Raises UserError where its bytes are no longer those that were written."""
        row = self._index[number]
        at, height, width = int(row["at"]), int(row["height"]), int(row["width"])
        flat = self._pixels[at : at + height * width * self._channels]
        if not self._checked[number]:
            if len(flat) != height * width * self._channels or zlib.crc32(flat.data) != row["crc32"]:
                raise UserError(f"data.decoded_cache: '{self._file}' is damaged: delete it, and it is made again")
            self._checked[number] = True
        found: Pixels = flat.reshape(height, width, self._channels)
        return found


class DecodedCache:
    """A folder of decoded splits, at most `limit` bytes; those used longest ago are removed first."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit

    def split(self, facts: Any, channels: int, count: int, images: Iterator[Pixels | None]) -> Decoded | None:
        """The decoded split that `facts` describe: as it is there, or made from its `count` images, in their order.

        One that is None is bad. Returns None, after a warning, where they do not fit, judged by the first of them; that
        is remembered. One process makes it, the others of the machine wait. Raises UserError where the folder cannot be
        written, or what is there is damaged.
        """
        made_by = {name: version(name) for name in _DECODERS}
        name = hashlib.sha256(json.dumps([facts, made_by], sort_keys=True).encode()).hexdigest()[:32]
        pixels, index = self.folder / f"{name}.pixels", self.folder / f"{name}.npy"
        try:
            with storage.room(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            with storage.locked(self.folder / f"{name}.lock", f"data.decoded_cache={self.folder}", wait=True):
                while True:
                    if not (index.exists() and pixels.exists()):
                        self._make(pixels, index, count, images)
                    with contextlib.suppress(FileNotFoundError):  # another split has made room
                        now = time.time_ns()
                        os.utime(pixels, ns=(now, now))
                        return Decoded(pixels, _read_index(index, count), channels)
        except (storage.DiskFull, _TooLargeError) as error:
            warnings.warn(
                f"data.decoded_cache={self.folder}: a split does not fit ({error}), and is decoded anew in each epoch",
                stacklevel=2,
            )
            return None
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"data.decoded_cache={self.folder} cannot be used: {error.strerror}") from error

    def _make(self, pixels: Path, index: Path, count: int, images: Iterator[Pixels | None]) -> None:
        refused = pixels.with_suffix(".too-large")
        if refused.exists() and int(refused.read_text() or 0) >= self.limit:
            raise _TooLargeError(f"data.decoded_cache_bytes={self.limit}")
        for left in self.folder.glob(f".{pixels.name}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        try:
            self._write(pixels, index, count, images)
        except _TooLargeError:
            refused.write_text(str(self.limit))
            raise

    def _write(self, pixels: Path, index: Path, count: int, images: Iterator[Pixels | None]) -> None:
        rows, at = list[tuple[int, int, int, int, int]](), 0
        with storage.atomic_path(pixels) as temporary, temporary.open("wb") as stream:
            for image in images:
                if image is None:
                    rows.append((at, 0, 0, 0, 0))
                    continue
                data = np.ascontiguousarray(image).data
                if not at:
                    self._make_room(data.nbytes * count)
                if at + data.nbytes > self.limit:
                    raise _TooLargeError(f"data.decoded_cache_bytes={self.limit}")
                stream.write(data)
                rows.append((at, image.shape[0], image.shape[1], zlib.crc32(data), 1))
                at += data.nbytes
        with storage.atomic_path(index) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.array(rows, _ROW), allow_pickle=False)
        self._make_room(0)

    def _make_room(self, needed: int) -> None:
        """Remove the splits used longest ago, so that `needed` bytes more fit."""
        if needed > self.limit:
            raise _TooLargeError(f"data.decoded_cache_bytes={self.limit}")
        found = []
        for path in self.folder.glob("*.pixels"):
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = needed + sum(size for _, size, _ in found)
        free = shutil.disk_usage(self.folder).free
        for _, size, path in sorted(found):
            if total <= self.limit and needed <= free:
                break
            path.with_suffix(".npy").unlink(missing_ok=True)  # a process that has it mapped still reads it
            path.unlink(missing_ok=True)
            total, free = total - size, free + size
        if needed > free:
            raise _TooLargeError(f"{free:,} bytes are free")


def _read_index(path: Path, count: int) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
        if found.dtype == _ROW and found.shape == (count,):
            return np.asarray(found)
    except (ValueError, EOFError):
        pass
    raise UserError(f"data.decoded_cache: '{path}' is damaged: delete it, and it is made again")


class _TooLargeError(Exception):
    """A split does not fit; the message says into what."""
