"""One split of a data set: where its samples lie, and how they become batches, from memory or as they stream."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.seeding import uniform
from pipeline.data import decoder, images, stream
from pipeline.data.cache import Cache, Entry
from pipeline.data.columns import Numbers, Rows, Shard
from pipeline.data.decoded import Decoded, DecodedCache
from pipeline.data.decoder import Pixels
from pipeline.data.manifest import Manifest
from pipeline.data.stream import Piece, Raw
from pipeline.settings.data import Data

Progress = Callable[[str, int, int], None]
T = TypeVar("T")
R = TypeVar("R")

_GAP = 2**20  # bytes; a longer stretch of unwanted samples is jumped over, a shorter one read and dropped
_SMALL = 8 * 2**10  # bytes; one thread decodes smaller images: several would only wait for each other
_FEW = 2**20  # samples of a split whose labels are all held in memory
_OPEN = 512  # shards of which it is remembered what the manifest says
_CHUNK = 64  # images a thread decodes at a time when a split is brought to memory


@dataclass
class Batch:
    """n samples: images uint8 (n, C, size, size), labels int64 (n,), weights float32 (n,), indices int64 (n,).

    The images lie in memory channels last. A bad image keeps its slot: zeros, with weight 0. `indices` are sample
    numbers within the split.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True)
class _Memory:
    """A whole split, decoded: one array (N, size, size, C), or canvases where training crops at random or where it lies
    on disk."""

    images: Pixels | list[Pixels] | Decoded
    good: NDArray[np.bool_]


class _Kept(NamedTuple):
    """The samples of a shard that belong to a split: number in the shard, first byte, byte after the last, ..."""

    place: Numbers
    start: Numbers
    stop: Numbers
    labels: Numbers
    crc32: Numbers | None


def open_split(config: Data, root: str, manifest: Manifest, split: str) -> Split:
    """The split `train`, `val` or `test` of the shards in `root`.

    Raises UserError where a shard is missing or has another size than the manifest says, or a label is
    outside of the classes.
    """
    assert split in ("train", "val", "test"), split
    opened = Split(config, root, manifest, split)
    opened.check()
    return opened


class Split:
    """The samples of a split, numbered 0..n-1 in manifest order; a held-out val looks as a stored one does.

    `counts` samples in each shard, int64; `window` how many places a lane's order may move a sample; `bad` the images
    found unreadable so far by this process, `shard/key` to reason. What the manifest says of a shard's samples is read
    when the shard is used.
    """

    def __init__(self, config: Data, root: str, manifest: Manifest, name: str) -> None:
        self.config = config
        self.name = name
        self.label = manifest.label
        self.num_classes = config.classes or manifest.num_classes
        self.bad: dict[str, str] = {}
        self._held_out = manifest.holdout and name == "val"
        self.shards = manifest.splits["train" if self._held_out else name]
        self.root, self._data = root, manifest.identity
        self.versions: dict[str, str] = {}  # versions of remote shards, by name, when the split was opened
        self.cache: Cache | None = None
        self.counts: Numbers = self.shards.held if self._held_out else self.shards.used - self.shards.held
        self._first: Numbers = np.cumsum(self.counts) - self.counts  # number of the first sample of each shard
        self._total = int(self.counts.sum())
        table = self.shards.table
        self._stored = sum(table["bytes"].tolist()) // sum(table["samples"].tolist())
        self._kept = functools.lru_cache(maxsize=_OPEN)(self._read_kept)
        self.window = max(1, config.shuffle_bytes // self._stored)
        self._cropped = name == "train" and "resized-crop" in config.augment
        self._lock = threading.Lock()
        self._memory: _Memory | None = None
        self._streams = False

    def __len__(self) -> int:
        return self._total

    @functools.cached_property
    def labels(self) -> Numbers:
        """The label of each sample, (n,); reads the rows of all shards."""
        return np.concatenate([self._kept_of(*each).labels for each in enumerate(self.shards.all_rows())])

    def labels_of(self, numbers: Numbers) -> Numbers:
        """The labels of some samples; reads the rows of their shards."""
        if len(self) <= _FEW:
            return self.labels[numbers]
        shards = self._shards_of(numbers)
        labels = np.empty(len(numbers), np.int64)
        for shard in np.unique(shards).tolist():
            mine = shards == shard
            labels[mine] = self._kept(shard).labels[numbers[mine] - self._first[shard]]
        return labels

    def _shards_of(self, numbers: Numbers) -> Numbers:
        """The shard that holds each sample."""
        return np.searchsorted(self._first, numbers, side="right") - 1

    def _read_kept(self, number: int) -> _Kept:
        """What the manifest says of the samples of a shard that belong to this split."""
        return self._kept_of(number, self.shards.rows(number))

    def _kept_of(self, number: int, rows: Rows) -> _Kept:
        shard = self.shards[number]
        left_out = np.concatenate([rows.skipped, rows.held])
        place = rows.held if self._held_out else np.setdiff1d(np.arange(shard.samples), left_out)
        stop = np.append(rows.offsets[1:], shard.bytes)
        crc32 = None if rows.crc32 is None else rows.crc32[place]
        return _Kept(place, rows.offsets[place], stop[place], rows.labels[place], crc32)

    def check(self) -> None:
        """UserError where a shard is missing or has another size, or a label is outside of the classes."""
        used = np.flatnonzero(self.counts).tolist()
        shards = [self.shards[number] for number in used]
        found = storage.stats_of(self.root, [shard.name for shard in shards])
        for shard in shards:
            url = storage.join(self.root, shard.name)
            known = found.get(shard.name)
            problem = None
            if known is None:
                problem = "is missing"
            elif known.bytes != shard.bytes:
                problem = f"has {known.bytes} bytes where the manifest says {shard.bytes}"
            if problem:
                raise UserError(
                    f"shard '{url}' {problem}: `secateur shards verify` lists all that differs; restore the shard, "
                    "or build or index again"
                )
        if not storage.is_local(self.root):
            self.versions = {name: known.version for name, known in found.items()}
            if self.config.cache_dir is not None:
                self.cache = Cache(self.config.cache_dir, self.config.cache_disk_bytes, map(self._entry, shards))
        self._require_labels()

    def _require_labels(self) -> None:
        """Raise UserError where a label is outside of the classes."""
        for number in np.flatnonzero((self.shards.table["highest"] >= self.num_classes) & (self.counts > 0)).tolist():
            kept = self._kept(number)
            for place in np.flatnonzero(kept.labels >= self.num_classes).tolist():
                raise UserError(
                    f"shard '{storage.join(self.root, self.shards[number].name)}': sample {kept.place[place]} has the "
                    f"label {kept.labels[place]}, but there are {self.num_classes} classes (0..{self.num_classes - 1}"
                    "): set data.classes, or index the shards again"
                )

    def read(self, numbers: Numbers, places: Numbers | None = None) -> Iterator[Raw]:
        """The stored images of samples in turn, or as output places[i] for input i; ranged reads, nothing decoded."""
        return stream.read_pieces(self._pieces(numbers), self.label, places, self.cache)

    @property
    def distant(self) -> bool:
        """Whether the shards are behind requests, not on a disk."""
        return not storage.is_local(self.root)

    def _pieces(self, numbers: Numbers) -> Iterator[Piece]:
        """Ranges of shards that hold `numbers` in turn: a new one at another shard, a step back or a long gap.

        The rows of a shard are read when its first piece is asked for.
        """
        shards = self._shards_of(numbers)
        edges = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(numbers)]
        for first, last in itertools.pairwise(edges):
            if first < last:
                number = int(shards[first])
                yield from self._pieces_of(number, numbers[first:last] - self._first[number])

    def _pieces_of(self, number: int, wanted: Numbers) -> Iterator[Piece]:
        """Those of one shard; `wanted` are numbers among its samples of this split."""
        shard, kept = self.shards[number], self._kept(number)
        place, start, stop = kept.place[wanted], kept.start[wanted], kept.stop[wanted]
        breaks = (np.diff(place) <= 0) | (start[1:] - stop[:-1] > _GAP)
        version = self.versions.get(shard.name)
        for a, b in itertools.pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), len(wanted)]):
            whole = version is not None and (start[a], stop[b - 1]) == (0, shard.bytes)
            crc32 = None if kept.crc32 is None else kept.crc32[wanted[a:b]]
            yield Piece(
                storage.join(self.root, shard.name), int(start[a]), int(stop[b - 1]), place[a:b],
                kept.labels[wanted[a:b]], crc32, version, shard.sha256 if whole else None,
            )  # fmt: skip

    def _entry(self, shard: Shard) -> Entry:
        return Entry(storage.join(self.root, shard.name), self.versions[shard.name], shard.bytes, shard.sha256)

    def canvas(self, raw: Raw) -> Pixels | None:
        """The decoded image, or None for a bad one, which is noted in `bad`."""
        config = self.config
        try:
            return decoder.decode(raw.data, config.channels, config.resize, config.decoder, self._cropped)
        except decoder.BadImage as error:
            self.bad[f"{raw.url}/{raw.key}"] = str(error)
            return None

    def load(self, progress: Progress | None = None) -> bool:
        """Bring the split to memory, once, if it fits data.cache_bytes, or else to data.decoded_cache, if there is one.

        Returns whether it is there.
        """
        with self._lock:
            if self._memory is None and not self._streams:
                self._memory = self._decode_all(progress) or self._decoded_on_disk(progress)
                self._streams = self._memory is None
        return self._memory is not None

    def _decode_all(self, progress: Progress | None) -> _Memory | None:
        """Decode every image, or None as soon as it is clear that they do not fit."""
        config, total, whole = self.config, len(self), self._whole
        if not whole and total * config.channels * config.size**2 > config.cache_bytes:
            return None
        fixed = (total, config.size, config.size, config.channels)
        store: Pixels | list[Pixels] = [] if whole else np.zeros(fixed, np.uint8)
        good = np.zeros(total, np.bool_)
        used = 0
        with contextlib.closing(self._decoded(progress)) as decoded:
            for done, canvas in enumerate(decoded):
                good[done] = canvas is not None
                if not isinstance(store, list):
                    store[done] = 0 if canvas is None else canvas
                else:
                    store.append(np.zeros(fixed[1:], np.uint8) if canvas is None else canvas)
                    used += store[-1].nbytes
                    # Judged by the first image before the rest is read, and again if later ones are larger.
                    if max(used, store[0].nbytes * total) > config.cache_bytes:
                        return None
        return _Memory(store, good)

    @property
    def _whole(self) -> bool:
        """Whether decoded images are kept whole, since training crops them."""
        return self.name == "train" and images.needs_canvas(self.config)

    def _decoded(self, progress: Progress | None) -> Generator[Pixels | None, None, None]:
        """Every image in turn, whole or as evaluation sees it; None for one that cannot be read."""

        def work(raws: list[Raw]) -> list[Pixels | None]:
            found = [self.canvas(raw) for raw in raws]
            return found if self._whole else [None if c is None else images.middle(c, self.config) for c in found]

        done, total = 0, len(self)
        with contextlib.closing(
            self._in_background(work, stream.chunks(self.read(np.arange(total)), _CHUNK))
        ) as decoded:
            for canvas in itertools.chain.from_iterable(decoded):
                yield canvas
                done += 1
                if progress and (done % _CHUNK == 0 or done == total):
                    progress(f"decoding {self.name}", done, total)
        assert done == total, (done, total)

    def _decoded_on_disk(self, progress: Progress | None) -> _Memory | None:
        """The split on this node's disk, decoded; None where there is no data.decoded_cache, or no room in it."""
        config = self.config
        if config.decoded_cache is None:
            return None
        kept = (config.channels, config.resize, config.decoder, self._cropped if self._whole else config.size)
        table = hashlib.sha256(self.shards.table.tobytes()).hexdigest()  # not what the manifest calls itself
        facts = [self._data, table, self.name, self._whole, kept]
        cache = DecodedCache(config.decoded_cache, config.decoded_cache_bytes)
        with contextlib.closing(self._decoded(progress)) as decoded:
            found = cache.split(facts, config.channels, len(self), decoded)
        return None if found is None else _Memory(found, found.good)

    def batch(self, numbers: Numbers, raws: list[Raw] | None, stream_seed: int | None) -> Batch:
        """Make a batch of samples: from `raws`, or from memory (None). Augmented from `stream_seed`, if given."""
        config = self.config
        draws = None
        if stream_seed is not None and config.augment:
            draws = uniform(stream_seed, numbers, images.DRAWS)
        if raws is None:
            assert self._memory is not None
            good = self._memory.good[numbers]
        else:
            good = np.ones(len(numbers), np.bool_)
        if raws is None and self.gathers:
            assert self._memory is not None
            pixels = np.asarray(self._memory.images)[numbers]
        else:
            pixels = np.zeros((len(numbers), config.size, config.size, config.channels), np.uint8)
            for i, number in enumerate(numbers.tolist()):
                canvas = self.canvas(raws[i]) if raws is not None else self._memory.images[number]  # type: ignore[union-attr]
                if canvas is None or not canvas.size:
                    good[i] = False
                elif raws is None and not self._whole:  # it was cut before it was kept
                    pixels[i] = canvas
                elif draws is not None:
                    pixels[i] = images.window(canvas, config, draws[i])
                else:
                    pixels[i] = images.middle(canvas, config)
        if draws is not None:
            pixels = images.finish(pixels, config, draws)
        return Batch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            torch.from_numpy(self.labels_of(numbers)),
            torch.from_numpy(good.astype(np.float32)),
            torch.from_numpy(numbers.copy()),
        )

    @property
    def gathers(self) -> bool:
        """Whether images lie in memory in the network's size, so that a batch is one indexing."""
        return self._memory is not None and isinstance(self._memory.images, np.ndarray)

    def batches(self, order: Iterator[Numbers], read: Callable[[], Iterator[Raw]], seed: int | None) -> Iterator[Batch]:
        """Batches of the sample numbers in `order`; where the split streams, `read` gives the images in that order."""
        if not self.load():
            return self._in_background(lambda work: self.batch(*work, seed), _with_images(order, read()))
        if self.gathers:
            return (self.batch(numbers, None, seed) for numbers in order)
        return self._in_background(lambda numbers: self.batch(numbers, None, seed), order)

    def _in_background(self, function: Callable[[T], R], items: Iterator[T]) -> Generator[R, None, None]:
        """function(item) for each item, in order and a few ahead: one thread reads, data.decode_threads compute."""
        if self._stored < _SMALL:
            return stream.prefetch((function(item) for item in items), ahead=3)
        threads = self.config.decode_threads
        return stream.ordered_map(function, stream.prefetch(items, ahead=2), threads, ahead=threads + 1)


def _with_images(order: Iterator[Numbers], raws: Iterator[Raw]) -> Iterator[tuple[Numbers, list[Raw]]]:
    try:
        for numbers in order:
            yield numbers, [next(raws) for _ in range(len(numbers))]
    finally:
        stream.close(raws)
