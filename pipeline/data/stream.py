"""From shards to samples: the stages of the reader, as webdataset pipelines, and ordered work in threads."""

from __future__ import annotations

import contextlib
import functools
import itertools
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from webdataset import DataPipeline
from webdataset.tariterators import group_by_keys

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data.cache import Cache
from pipeline.data.describe import Hashing
from pipeline.data.manifest import IMAGES, parse_label
from pipeline.data.tar import SampleFiles

T = TypeVar("T")
R = TypeVar("R")
Item = dict[str, Any]  # what WebDataset's stages pass on
Members = Item  # one sample: __key__, __url__, then suffix -> bytes
_END: Any = object()
_HANDED = 64  # items that a thread hands over at a time, at most
_AT_ONCE = 4096  # numbers of a long array that are Python's at a time: each takes 4 times the memory then


@dataclass(frozen=True)
class Piece:
    """A range of one shard: bytes `start`..`stop` hold samples `first` and on, of which `wanted` (rising) are used."""

    url: str
    start: int
    stop: int
    wanted: NDArray[np.int64]
    labels: NDArray[np.int64]
    crc32: NDArray[np.int64] | None = None  # of each wanted image, where the manifest has it
    version: str | None = None  # of a remote shard, as it was when the split was opened
    sha256: str | None = None  # where the range is a whole remote shard, checked when all of it has passed


@dataclass(frozen=True)
class Raw:
    """An image as stored, not decoded."""

    url: str
    key: str
    data: bytes


def read_members(ranges: list[tuple[str, int, int | None]]) -> Iterator[Members]:
    """The samples in ranges (url, start, stop) of shards, undecoded. UserError where a tar is torn."""
    sources = [{"url": url, "start": start, "stop": stop} for url, start, stop in ranges]
    opened = functools.partial(_open_ranges, None)
    return iter(DataPipeline(lambda: iter(sources), opened, _expand, group_by_keys))


def read_pieces(
    pieces: Iterable[Piece], label: str, places: NDArray[np.int64] | None = None, cache: Cache | None = None
) -> Iterator[Raw]:
    """The wanted samples of pieces in turn, or put in the order of `places` (input i is output places[i]).

    Holds at most as many samples as the longest move in `places`. Raises UserError where a shard is not what the
    manifest says.
    """
    to_open, to_pick = itertools.tee(pieces)
    ranges = (
        {"url": p.url, "start": p.start, "stop": p.stop, "version": p.version, "sha256": p.sha256} for p in to_open
    )
    opened, picked = functools.partial(_open_ranges, cache), functools.partial(_pick, to_pick, label)
    stages = [opened, _expand, group_by_keys, picked]
    if places is not None:
        stages.append(functools.partial(reorder, places))
    return iter(DataPipeline(lambda: ranges, *stages))


def _open_ranges(cache: Cache | None, ranges: Iterable[Item]) -> Iterator[Item]:
    """Our opener: through storage, never through WebDataset's URL handlers, which can run a shell."""
    for item in ranges:
        url, start, stop = item["url"], item["start"], item["stop"]
        try:
            kept = cache.open(url, start, stop) if cache is not None else None
            stream = kept or storage.open_range(url, start, stop, item.get("version"))
        except FileNotFoundError as error:
            raise _mismatch(url, "is missing") from error
        wanted = item.get("sha256") if kept is None else None
        hashing = Hashing(stream, wanted is not None)
        with stream:
            yield {"url": url, "stream": hashing}
            if wanted is not None and hashing.rest() != wanted:
                raise _mismatch(url, "has another SHA-256")


def _expand(ranges: Iterable[Item]) -> Iterator[Item]:
    """The files of each range, as WebDataset's stages pass them on; {} ends one. UserError where a tar is damaged."""
    for item in ranges:
        url = item["url"]
        try:
            for file in SampleFiles(item["stream"]):
                yield {"fname": f"{file.key}.{file.suffix}", "data": file.data, "__url__": url}
        except tarfile.TarError as error:
            raise _mismatch(url, f"is cut short or damaged ({error})") from error
        yield {}


def _pick(pieces: Iterable[Piece], label: str, samples: Iterable[Members]) -> Iterator[Raw]:
    """The wanted samples of each piece, checked against what the manifest says."""
    stream = iter(samples)
    for piece in pieces:
        here = int(piece.wanted[0])
        crcs = itertools.repeat(None, len(piece.wanted)) if piece.crc32 is None else piece.crc32.tolist()
        for wanted, number, crc in zip(piece.wanted.tolist(), piece.labels.tolist(), crcs, strict=True):
            while True:
                sample = next(stream, None)
                if sample is None or sample["__url__"] != piece.url:
                    raise _mismatch(piece.url, f"ends before sample {wanted}")
                here += 1
                if here > wanted:
                    break
            data = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
            if data is None or _label(piece.url, sample, label) != number:
                raise _mismatch(piece.url, f"holds another sample {wanted} ('{sample['__key__']}')")
            if crc is not None and zlib.crc32(data) != crc:
                raise _mismatch(piece.url, f"holds other bytes in the image of sample '{sample['__key__']}'")
            yield Raw(piece.url, sample["__key__"], data)


def _label(url: str, sample: Members, label: str) -> int:
    try:
        return parse_label(sample, label)
    except ValueError as error:
        raise _mismatch(url, f"has a sample '{sample['__key__']}' that {error}") from error


def _mismatch(url: str, problem: str) -> UserError:
    return UserError(
        f"shard '{url}' {problem}, which the manifest does not say: `secateur shards verify` lists what differs; "
        "restore the shard, or build or index again"
    )


def reorder(places: NDArray[np.int64], items: Iterable[T]) -> Iterator[T]:
    """Give input i out as output places[i]; `places` is a permutation."""
    waiting: dict[int, T] = {}
    due = 0
    pieces = (places[start : start + _AT_ONCE].tolist() for start in range(0, len(places), _AT_ONCE))
    for place, item in zip(itertools.chain.from_iterable(pieces), items, strict=True):
        waiting[place] = item
        while due in waiting:
            yield waiting.pop(due)
            due += 1
    assert not waiting, len(waiting)


@contextlib.contextmanager
def side_by_side(readers: Sequence[Iterator[T]], ahead: int) -> Iterator[list[Iterator[T]]]:
    """The same readers, each read by a thread that is `ahead` items in advance: they wait for their sources, also for
    the first items, at the same time. At the end of the block the threads are gone.
    """
    fetched = [_ahead(reader, ahead) for reader in readers]
    try:
        with ThreadPoolExecutor(len(fetched) or 1, thread_name_prefix="secateur-data") as pool:
            firsts = pool.map(lambda items: list(itertools.islice(items, 1)), fetched)
            begun: list[Iterator[T]] = [
                itertools.chain(first, items) for first, items in zip(firsts, fetched, strict=True)
            ]
        yield begun
    finally:
        for items in fetched:
            items.close()


def _ahead(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    with contextlib.closing(prefetch(chunks(items, min(ahead, _HANDED)), ahead=1 + ahead // _HANDED)) as fetched:
        yield from itertools.chain.from_iterable(fetched)


def chunks(items: Iterable[T], count: int) -> Iterator[list[T]]:
    """Lists of `count` items, the last one shorter."""
    chunk: list[T] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == count:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def prefetch(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The same items, fetched by one background thread, at most `ahead` in advance. Closing it ends the thread."""
    try:
        yield from ordered_map(lambda _: next(items, _END), itertools.repeat(None), threads=1, ahead=ahead)
    finally:
        close(items)


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Generator[R, None, None]:
    """function(item) for each item, in order, computed in threads at most `ahead` in advance. Closing it ends the
    threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="secateur-data")
    pending: deque[Future[R]] = deque()
    source = iter(items)
    try:
        while True:
            while len(pending) < ahead:
                item = next(source, _END)
                if item is _END:
                    break
                pending.append(pool.submit(function, item))
            if not pending:
                return
            result = pending.popleft().result()
            if result is _END:  # prefetch's items have run out
                return
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        close(source)


def close(items: Iterator[Any]) -> None:
    """Close a generator now, and with it the files and threads that it holds."""
    if isinstance(items, Generator):
        items.close()
