"""Describe shards that are there: one pass over a tar, for the manifest."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import decoder, placement
from pipeline.data.columns import Described, Rows, Shard
from pipeline.data.manifest import IMAGES, parse_label
from pipeline.data.parts import check_tar_end
from pipeline.data.tar import SampleFiles

_SORTED_LEAST = 20  # fewer samples say little about their order
_UNREADABLE = "__unreadable__"  # the entry of a sample with why its image cannot be decoded
NO_LABEL, NO_IMAGE, TWO_IMAGES, UNREADABLE = "without a label", "without an image", "with two images", "unreadable"


class Bad(NamedTuple):
    """`what` is wrong with a sample that cannot be used, and its `kind`, one of those above.

    `dotted` is a file of it whose key has a dot, if there is one.
    """

    what: str
    kind: str
    dotted: str | None


class BadSample(UserError):
    """A sample that cannot be used; `bad` says why."""

    def __init__(self, what: str, remedy: str, kind: str, dotted: str | None = None) -> None:
        if dotted is not None:
            what += f" (a key ends at the first dot, which cuts '{dotted}' short)"
            remedy = "rename such files"
        super().__init__(f"{what}: {remedy}, or leave such samples out with `secateur shards index --skip-bad`")
        self.bad = Bad(what, kind, dotted)


class Hashing:
    """A stream that passes reads on and hashes them: a shard is read and hashed in one pass."""

    def __init__(self, stream: BinaryIO, hashes: bool = True) -> None:
        self._stream, self._hashes = stream, hashes
        self.digest = hashlib.sha256()
        self.bytes = 0

    def read(self, count: int = -1) -> bytes:
        data = self._stream.read(count)
        if self._hashes:
            self.digest.update(data)
        self.bytes += len(data)
        return data

    def rest(self) -> str:
        """Read to the end; the SHA-256 of all of it."""
        while self.read(2**20):
            pass
        return self.digest.hexdigest()


def scan_shard(root: str, name: str, label: str, num_classes: int | None, bad: list[Bad] | None = None) -> Described:
    """Describe one tar by a single pass over it.

    Raises UserError naming shard and key: empty, torn, not a tar, a sample without image or label, two
    images, a label outside 0..num_classes-1. With `bad`, images are decoded too, and a sample that cannot be used is
    skipped and added to it; a label outside of the classes is refused even so.
    """
    url = storage.join(root, name)
    offsets: list[int] = []
    samples: list[dict[str, Any]] = []
    with storage.open_range(url) as stream:
        hashing = Hashing(stream)
        files = SampleFiles(hashing)
        try:
            for file in files:
                if not samples or samples[-1]["__key__"] != file.key:
                    offsets.append(file.offset)
                    samples.append({"__key__": file.key})
                kept = file.suffix == ("cls" if label == "cls" else "json")
                samples[-1][file.suffix] = file.data if kept else zlib.crc32(file.data)
                if bad is not None and file.suffix in IMAGES and (problem := _undecodable(file.data)):
                    samples[-1][_UNREADABLE] = problem
        except tarfile.TarError as error:
            raise UserError(
                f"shard '{url}' is empty, cut short, damaged or not an uncompressed tar ({error})"
            ) from error
        sha256 = hashing.rest()
    check_tar_end(url, files.end)
    if not samples:
        raise UserError(f"shard '{url}' holds no samples: remove it, or make it again")
    found: list[tuple[int, int]] = []
    skipped: list[int] = []
    for number, sample in enumerate(samples):
        try:
            found.append(_checked(url, sample, label, num_classes))
        except BadSample as error:
            if bad is None:
                raise
            bad.append(error.bad)
            skipped.append(number)
            found.append((0, 0))
    labels, crcs = np.array(found, np.int64).T
    shard = Shard(name, len(samples), hashing.bytes, sha256, len(skipped))
    return shard, Rows(np.array(offsets, np.int64), labels, crcs, np.array(skipped, np.int64))


def told(bad: Sequence[Bad], samples: int) -> list[str]:
    """What is to be said of samples that were skipped, of `samples`: how many, why, and the first."""
    if not bad:
        return []
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in Counter(each.kind for each in bad).most_common())
    notes = [f"{len(bad):,} of {samples:,} samples are skipped: {kinds}; the first: {bad[0].what}"]
    dotted = [each.dotted for each in bad if each.dotted is not None]
    if dotted:
        notes.append(
            f"{len(dotted):,} of the skipped samples have dots in their keys, such as '{dotted[0]}': a key ends at the "
            "first dot, so rename such files to use them"
        )
    return notes


def sorted_warnings(root: str, described: Sequence[Described]) -> Iterator[str]:
    """A warning for each shard whose neighbours share a label far more often than mixed ones would."""
    labels = [np.delete(rows.labels, rows.skipped) for _, rows in described]
    _, counts = np.unique(np.concatenate(labels), return_counts=True)
    mixed = float(np.sum((counts / counts.sum()) ** 2))
    for (shard, _), mine in zip(described, labels, strict=True):
        same = placement.same_label_neighbours(mine)
        if len(mine) >= _SORTED_LEAST and same > (1 + mixed) / 2:
            yield (
                f"shard '{storage.join(root, shard.name)}' is sorted by class ({same:.0%} of neighbours share a "
                f"label, {mixed:.0%} if mixed): batches will be poorly mixed; write the shards in shuffled order"
            )


def _undecodable(data: bytes) -> str | None:
    try:
        decoder.decode(data, 3)
    except decoder.BadImage as error:
        return str(error)
    return None


def _dotted(sample: Mapping[str, Any]) -> str | None:
    """A file of the sample whose name has a dot before the one that its ending begins with."""
    for ending in (*IMAGES, "cls", "json"):
        for suffix in sample:
            if suffix.endswith(f".{ending}"):
                return f"{sample['__key__']}.{suffix}"
    return None


def _checked(url: str, sample: Mapping[str, Any], label: str, num_classes: int | None) -> tuple[int, int]:
    """The label of a sample and the CRC-32 of its image."""
    where = f"shard '{url}': sample '{sample['__key__']}'"
    there = [suffix for suffix in IMAGES if suffix in sample]
    if len(there) != 1:
        problem, kind = ("two images", TWO_IMAGES) if there else ("no image", NO_IMAGE)
        remedy = "give it exactly one member .jpg, .jpeg or .png"
        raise BadSample(f"{where} has {problem}", remedy, kind, _dotted(sample))
    try:
        number = parse_label(sample, label)
    except ValueError as error:
        remedy = "mend it, set data.label to where labels are"
        raise BadSample(f"{where} {error}", remedy, NO_LABEL, _dotted(sample)) from error
    if num_classes is not None and number >= num_classes:
        raise UserError(f"{where} has the label {number}, but there are {num_classes} classes (0..{num_classes - 1})")
    if _UNREADABLE in sample:
        raise BadSample(f"{where} has an image that cannot be read ({sample[_UNREADABLE]})", "replace it", UNREADABLE)
    return number, sample[there[0]]
