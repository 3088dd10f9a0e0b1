"""Untrusted tars: read in one pass, nothing unpacked, and sizes checked before they cost memory or time."""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

_MOST_HEADER = 16 * 2**10  # bytes of an extended header; Python's parser takes the square of its length in time
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
_META = re.compile(r"__[^/]*__($|/)")  # names that WebDataset's reader passes over
# What Python's reader is known to raise on damaged headers, beside its own errors.
_DAMAGE = (ValueError, OverflowError, RecursionError, IndexError, KeyError, TypeError, AttributeError, EOFError)


class Header(tarfile.TarInfo):
    """A header that is refused, by a TarError, before Python's reader acts on it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.ReadError(f"member '{header.name}' declares {header.size} bytes")
        if header.type in _EXTENDED and header.size > _MOST_HEADER:
            raise tarfile.ReadError(f"an extended header declares {header.size} bytes")
        if header.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"member '{header.name}' is sparse")
        return header


class Member(NamedTuple):
    """A file of a sample: `offset` is where its first header starts."""

    key: str
    suffix: str
    offset: int
    data: bytes


class SampleFiles:
    """The plain files of an uncompressed tar, in turn, named as WebDataset names them; `end` is where they stop.

    Links, devices, folders, and names without a suffix are passed over. Iterating raises TarError where the tar is
    damaged, holds a sparse file (a few bytes that stand for any number), or a sample has two files of one suffix.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.end = 0

    def __iter__(self) -> Iterator[Member]:
        key, seen = None, set[str]()
        with _opened(self._stream) as archive:
            while (found := _next(archive)) is not None:
                if not found.isreg() or _META.match(found.name):
                    continue
                here, suffix = base_plus_ext(found.name)
                if here is None:
                    continue
                suffix = suffix.lower()
                if here != key:
                    key, seen = here, set()
                if suffix in seen:
                    raise tarfile.ReadError(f"sample '{key}' has two .{suffix} members: give every sample its own key")
                seen.add(suffix)
                yield Member(here, suffix, found.offset, _content(archive, found))
            self.end = archive.offset


def _opened(stream: Any) -> tarfile.TarFile:
    """A tar that is read forward. Mode "r|", since "r|*" would decompress a compressed file."""
    with _damage():
        return tarfile.open(fileobj=stream, mode="r|", bufsize=2**18, tarinfo=Header)


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next header; TarError whatever is wrong with it."""
    with _damage():
        found = archive.next()
    archive.members = []  # type: ignore[attr-defined]  # or every header stays in memory
    if found is not None and (found.size < 0 or found.issparse()):
        raise tarfile.ReadError(f"member '{found.name}' is sparse or declares {found.size} bytes")
    return found


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Reading a header: all that Python's reader raises on a damaged one becomes a TarError."""
    try:
        yield
    except _DAMAGE as error:
        raise tarfile.ReadError(f"a header is damaged ({type(error).__name__})") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None, member.name
    with content:
        return content.read()
