"""What a source is made of: its parts, and the files (whole, or ranges of a tar) that hold their images."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import tar

SPLITS = ("train", "val", "test")
IMAGE_ENDINGS = (".jpeg", ".jpg", ".png")
_PACKED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}


class Item(Protocol):
    """Where the bytes of an image come from. It is pickled, for another process to read it."""

    def read(self) -> bytes:
        """The file's bytes."""


@dataclass(frozen=True)
class Part:
    """The samples of one part: `item(i)` is where image i comes from; `names[i]` is the file, or ''."""

    labels: NDArray[np.int64]
    names: tuple[str, ...]
    item: Callable[[int], Item]

    def read(self, number: int) -> bytes:
        """The bytes of an image."""
        return self.item(number).read()


@dataclass(frozen=True)
class Source:
    """What shards are built from. `fingerprint` changes when the images or labels do.

    Without a `val` part of its own, val is drawn from train.
    """

    classes: tuple[str, ...]
    num_classes: int
    train: Part
    test: Part
    fingerprint: str
    val: Part | None = None


class Sizes(NamedTuple):
    """The numbers of samples in a source's parts, and of its classes, where they are known without its files."""

    train: int
    test: int
    classes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """An image file: its path within the source, and where the bytes are (a range of a tar, or a file by itself)."""

    name: str
    size: int
    url: str
    start: int

    def read(self) -> bytes:
        """The file's bytes. Raises UserError where the file has become shorter since it was listed."""
        with storage.open_range(self.url, self.start, self.start + self.size) as stream:
            data = stream.read()
        if len(data) != self.size:
            raise UserError(f"'{self.url}' was cut short since it was listed, at '{self.name}': fetch it again")
        return data


def tar_files(
    url: str, wanted: Callable[[str], bool], start: int = 0, stop: int | None = None, title: str | None = None
) -> Iterator[Entry]:
    """The files in an uncompressed tar whose names are `wanted`, by a pass over its headers.

    The tar is a whole file, or a range from `start` to `stop` of one (a tar within a tar), which errors call `title`.
    Raises UserError where it is compressed, torn or damaged, a name leads out of it, or a wanted member is not a plain
    file.
    """
    title = title or url
    with storage.open_range(url, start, start + 2) as stream:
        unpack = _PACKED.get(stream.read())
    if unpack:
        raise UserError(f"'{title}' is compressed, so images cannot be read in any order: run {unpack} first")
    try:
        with storage.local_path(url).open("rb") as stream:
            stream.seek(start)
            # tarfile counts offsets from the start of the stream, not from where it was given.
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=tar.Header) as archive:
                for member in archive:
                    if stop is not None and member.offset_data + member.size > stop:
                        raise UserError(f"'{title}' is cut short or damaged at byte {member.offset - start}")
                    name = PurePosixPath(member.name)
                    if name.is_absolute() or ".." in name.parts:
                        raise UserError(f"'{title}' holds '{member.name}', which leads out of it: pack it again")
                    if member.isdir() or not wanted(name.as_posix()):
                        continue
                    if not member.isreg() or member.issparse():
                        raise UserError(
                            f"'{title}': '{member.name}' is a link, not a file: pack it again with `tar --dereference "
                            "--hard-dereference`"
                        )
                    yield Entry(name.as_posix(), member.size, url, member.offset_data)
                end = archive.offset
    except tarfile.TarError as error:
        raise UserError(f"'{title}' is not a whole tar ({error}): fetch it again") from error
    if stop is not None and end + 512 > stop:
        raise UserError(f"'{title}' is cut short at byte {end - start}, without an end: fetch or make it again")
    check_tar_end(url, end, title)


def check_tar_end(url: str, end: int, title: str | None = None) -> None:
    """UserError unless the end marker stands at byte `end`: Python's reader stops silently where a tar is torn."""
    with storage.open_range(url, end, end + 512) as stream:
        if stream.read() != bytes(512):
            raise UserError(f"'{title or url}' is cut short or damaged at byte {end}: fetch or make it again")


def read_class_index(path: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class titles by number, and the number of each class folder, of a file {"0": ["n01440764", "tench"], ...}."""
    where = f"data.class_index='{path}'"
    try:
        index = storage.read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{where} does not exist: set it to a JSON file {{index: [folder, title]}}") from error
    form = f'{where} must be of the form {{"0": ["n01440764", "tench"], ...}}'
    if not isinstance(index, dict) or not index:
        raise UserError(form)
    if set(index) != {str(number) for number in range(len(index))}:
        raise UserError(f"{where} must number its {len(index)} classes 0..{len(index) - 1} without gaps")
    rows = [index[str(number)] for number in range(len(index))]
    if not all(isinstance(row, list) and len(row) == 2 and all(isinstance(v, str) for v in row) for row in rows):
        raise UserError(form)
    numbers = {row[0]: number for number, row in enumerate(rows)}
    if len(numbers) != len(rows):
        raise UserError(f"{where} names a folder twice")
    return tuple(row[1] for row in rows), numbers
