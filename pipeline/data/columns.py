"""The columns of a manifest: where each sample of each shard lies, what its label is, and which are used.

One binary file beside manifest.json. It begins with a table of a row for each shard, which is read when the manifest is
opened. After it comes a block for each shard, which is read, and checked by its SHA-256, when the shard is first used:
little-endian unsigned 32-bit numbers, for each sample its offset in tar blocks of 512 bytes, its label and, where they
are known, the CRC-32 of its image; then the numbers of samples that are not used, and of those held out as val.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.base.errors import UserError

Numbers = NDArray[np.int64]
BLOCK = 512  # bytes; every header of a tar starts at a multiple of it
LARGEST = 2**32 - 1  # of any number in a block
LARGEST_FILE = 2**53  # bytes of a shard; a larger one is damage
_KEPT = 512  # shards whose rows stay in memory, as they were read


def _none() -> Numbers:
    return np.zeros(0, np.int64)


class Damaged(Exception):
    """What is wrong with a manifest's columns; the message does not name the manifest."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The samples of one shard, in stored order: first byte of each, label, CRC-32 of its image if known.

    `skipped` are the numbers of samples that are not used, rising, and `held` of those that are val though their shard
    is one of train. Labels and CRCs of skipped samples are 0.
    """

    offsets: Numbers
    labels: Numbers
    crc32: Numbers | None = None
    skipped: Numbers = field(default_factory=_none)
    held: Numbers = field(default_factory=_none)

    def problem(self, bytes_: int) -> str | None:
        """What contradicts itself, for a shard of so many bytes."""
        samples = len(self.offsets)
        if len(self.labels) != samples or (self.crc32 is not None and len(self.crc32) != samples):
            crcs = "no" if self.crc32 is None else len(self.crc32)
            return f"has {samples} offsets, {len(self.labels)} labels, {crcs} CRCs"
        if samples and (self.offsets[0] < 0 or (np.diff(self.offsets) <= 0).any() or self.offsets[-1] >= bytes_):
            return f"has offsets that do not rise, or are outside of its {bytes_} bytes"
        for name, numbers in (("skips", self.skipped), ("holds out", self.held)):
            if len(numbers) and (numbers[0] < 0 or (np.diff(numbers) <= 0).any() or numbers[-1] >= samples):
                return f"{name} samples that are not there"
        if len(np.intersect1d(self.skipped, self.held)):
            return "holds out samples that it skips"
        for values in (self.labels, self.offsets // BLOCK, *(() if self.crc32 is None else (self.crc32,))):
            if len(values) and not 0 <= values.min() <= values.max() <= LARGEST:
                return f"has a number outside of 0..{LARGEST}"
        return "has offsets between tar blocks" if (self.offsets % BLOCK).any() else None


class Shard(NamedTuple):
    """One tar. `skipped` and `held` of its `samples` are not used, and val though it is one of train."""

    name: str
    samples: int
    bytes: int
    sha256: str
    skipped: int = 0
    held: int = 0

    @property
    def used(self) -> int:
        """How many samples are used, held out or not."""
        return self.samples - self.skipped


Described = tuple[Shard, Rows]


class Shards(Sequence[Shard]):
    """The shards of a split: `table` is in memory, the rows of a shard are read when they are asked for.

    `table` has a column for each field of Shard, `lowest` and `highest` label of the samples used.
    """

    def __init__(
        self, table: NDArray[Any], read: Callable[[int], Rows], read_all: Callable[[], Iterator[Rows]]
    ) -> None:
        self.table = table
        self.rows = functools.lru_cache(maxsize=_KEPT)(read)
        self.all_rows = read_all  # of each shard in turn, in a few requests

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> Shard: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Shard]: ...
    def __getitem__(self, place: int | slice) -> Shard | Sequence[Shard]:
        """A shard, or a list of them."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = self.table[place]
        return Shard(
            row["name"].decode(), int(row["samples"]), int(row["bytes"]), row["sha256"].tobytes().hex(),
            int(row["skipped"]), int(row["held"]),
        )  # fmt: skip

    def described(self) -> Iterator[Described]:
        """Each shard with its rows."""
        yield from zip(self, self.all_rows(), strict=True)

    def uses(self) -> list[tuple[str, list[int], list[int]]]:
        """For each shard its SHA-256, and the numbers of the samples that are not used, and that are held out."""
        if not (self.table["skipped"].any() or self.table["held"].any()):
            return [(shard.sha256, [], []) for shard in self]
        return [(shard.sha256, rows.skipped.tolist(), rows.held.tolist()) for shard, rows in self.described()]

    @property
    def used(self) -> Numbers:
        """For each shard, how many of its samples are used, held out or not."""
        found: Numbers = self.table["samples"].astype(np.int64) - self.table["skipped"]
        return found

    @property
    def held(self) -> Numbers:
        """For each shard, how many of its samples are held out as val."""
        found: Numbers = self.table["held"].astype(np.int64)
        return found


def in_memory(described: Iterable[Described]) -> Shards:
    """Shards whose rows are all at hand. Raises Damaged where they contradict themselves."""
    given = [*described]
    for shard, rows in given:
        if problem := rows.problem(shard.bytes):
            raise Damaged(f"shard {shard.name} {problem}")
    return Shards(_table(given), lambda number: given[number][1], lambda: (rows for _, rows in given))


def _row_type(name_bytes: int) -> np.dtype[Any]:
    fields = [
        ("name", f"S{max(1, name_bytes)}"), ("samples", "<u4"), ("bytes", "<u8"), ("sha256", "V32"), ("skipped", "<u4"),
        ("held", "<u4"), ("lowest", "<u4"), ("highest", "<u4"), ("crcs", "u1"), ("at", "<u8"), ("size", "<u8"),
        ("digest", "V32"),
    ]  # fmt: skip
    return np.dtype(fields)


def _table(given: Sequence[Described]) -> NDArray[Any]:
    """The rows of shards; where their blocks are is not known yet."""
    table = np.zeros(len(given), _row_type(max((len(shard.name.encode()) for shard, _ in given), default=1)))
    for number, (shard, rows) in enumerate(given):
        labels = np.delete(rows.labels, rows.skipped)
        table[number] = (
            shard.name.encode(), shard.samples, shard.bytes, bytes.fromhex(shard.sha256), len(rows.skipped),
            len(rows.held), labels.min(initial=LARGEST), labels.max(initial=0), rows.crc32 is not None, 0, 0, b"",
        )  # fmt: skip
    return table


@dataclass(frozen=True)
class Place:
    """What manifest.json says of its columns: the file, its size, that of its table and of a name, the table's hash."""

    file: str
    bytes: int
    name_bytes: int
    table_sha256: str


def write(root: str, splits: Sequence[Shards]) -> Place:
    """Write the columns of splits, one after the other, into a file of `root` that is named after its content."""
    given = [*itertools.chain.from_iterable(shards.described() for shards in splits)]
    table = _table(given)
    at = table.nbytes
    for number, (_, rows) in enumerate(given):
        block = _block(rows)
        table[number]["at"], table[number]["size"] = at, len(block)
        table[number]["digest"] = np.void(hashlib.sha256(block).digest())
        at += len(block)
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    file = f"manifest-{digest[:16]}.columns"
    with storage.create(storage.join(root, file)) as stream:
        stream.write(table.tobytes())
        for _, rows in given:
            stream.write(_block(rows))
    return Place(file, at, table.dtype["name"].itemsize, digest)


def _block(rows: Rows) -> bytes:
    parts = [rows.offsets // BLOCK, rows.labels, *([] if rows.crc32 is None else [rows.crc32]), rows.skipped, rows.held]
    return np.concatenate(parts).astype("<u4").tobytes()


def read(root: str, place: Place, counts: Sequence[int]) -> list[Shards]:
    """Splits of so many shards each. Raises Damaged; the rows of a shard raise UserError when they are read."""
    url, kind = storage.join(root, place.file), _row_type(place.name_bytes)
    size = sum(counts) * kind.itemsize
    if not size <= place.bytes:
        raise Damaged(f"its columns have {place.bytes} bytes, fewer than a table of {sum(counts)} shards")
    try:
        with storage.open_range(url, 0, size) as stream:
            data = stream.read()
    except FileNotFoundError as error:
        raise Damaged(f"'{url}' does not exist") from error
    if len(data) != size or hashlib.sha256(data).hexdigest() != place.table_sha256:
        raise Damaged(f"'{url}' is another file, or cut short")
    table = np.frombuffer(data, kind)
    if problem := _table_problem(table, place.bytes):
        raise Damaged(problem)
    edges = np.cumsum([0, *counts])
    return [
        Shards(part, functools.partial(_read_rows, url, part), functools.partial(_read_all, url, part))
        for part in (table[first:last] for first, last in itertools.pairwise(edges.tolist()))
    ]


def _table_problem(table: NDArray[Any], bytes_: int) -> str | None:
    samples, skipped, held = (table[name].astype(np.int64) for name in ("samples", "skipped", "held"))
    numbers = samples * (2 + (table["crcs"] > 0)) + skipped + held
    ends = table["at"].astype(np.float64) + table["size"]
    for wrong, problem in (
        (skipped + held > samples, "leaves out more samples than it has"),
        (table["size"] != 4 * numbers.astype(np.uint64), "has rows of another size"),
        (samples.astype(np.float64) * BLOCK > table["bytes"], "has more samples than fit into its bytes"),
        (ends > bytes_, "has rows that lie outside of the file"),
        ((table["lowest"] > table["highest"]) & (skipped < samples), "has labels in no order"),
        (table["bytes"] > LARGEST_FILE, "has a size that no file has"),
    ):
        if wrong.any():
            return f"shard {table['name'][int(np.argmax(wrong))].decode(errors='replace')} {problem}"
    return None


def _read_rows(url: str, table: NDArray[Any], number: int) -> Rows:
    """The rows of a shard. Raises UserError where they are not those that the table says."""
    row = table[number]
    at, size = int(row["at"]), int(row["size"])
    try:
        with storage.open_range(url, at, at + size) as stream:
            data = stream.read()
    except FileNotFoundError:
        data = b""
    return _parsed(url, row, data)


def _read_all(url: str, table: NDArray[Any]) -> Iterator[Rows]:
    """The rows of all shards, whose blocks follow one another. Raises UserError as `_read_rows` does."""
    if not len(table):
        return
    at, end = int(table[0]["at"]), int(table[-1]["at"]) + int(table[-1]["size"])
    try:
        stream = storage.open_range(url, at, end)
    except FileNotFoundError:
        _parsed(url, table[0], b"")
        raise
    with stream:
        for row in table:
            yield _parsed(url, row, stream.read(int(row["size"])))


def _parsed(url: str, row: Any, data: bytes) -> Rows:
    """The rows in a shard's block. Raises UserError where they are not those that the table says."""
    samples, skipped, held, size = (int(row[name]) for name in ("samples", "skipped", "held", "size"))
    problem: str | None = "are not those that were written"
    if len(data) == size and hashlib.sha256(data).digest() == row["digest"].tobytes():
        values = np.frombuffer(data, "<u4").astype(np.int64)
        columns = [samples, samples, *([samples] if row["crcs"] else []), skipped, held]
        offsets, labels, *crcs, left_out, out = np.split(values, np.cumsum(columns)[:-1])
        rows = Rows(offsets * BLOCK, labels, crcs[0] if crcs else None, left_out, out)
        problem = rows.problem(int(row["bytes"]))
        within = np.delete(rows.labels, rows.skipped) if problem is None else _none()
        if problem is None and len(within) and (within.min(), within.max()) != (row["lowest"], row["highest"]):
            problem = "have other labels than the table says"
        if problem is None:
            return rows
    raise UserError(
        f"'{url}' is damaged: the rows of shard {row['name'].decode(errors='replace')} {problem}: run `secateur shards "
        "index` (or `shards build`) again"
    )
