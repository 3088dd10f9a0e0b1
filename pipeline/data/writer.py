"""Write one shard: all that it takes is in a value that another process can be given."""

from __future__ import annotations

import hashlib
import re
import zlib
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
from webdataset import TarWriter

from pipeline import storage
from pipeline.data.columns import Described, Rows, Shard
from pipeline.data.describe import scan_shard
from pipeline.data.parts import Item
from pipeline.data.sources import extension


class Sample(NamedTuple):
    """What becomes one sample of a shard."""

    number: int
    name: str
    label: int
    item: Item


class Order(NamedTuple):
    """A shard to write, unless it is there already with this SHA-256."""

    root: str
    name: str
    sha256: str | None
    samples: list[Sample]


def made(order: Order) -> Described:
    """The shard as an earlier build wrote it, if it is still whole, else as it is written now."""
    url = storage.join(order.root, order.name)
    if order.sha256 is None or not storage.exists(url) or storage.sha256(url) != order.sha256:
        return _write_shard(order)
    described = scan_shard(order.root, order.name, "cls", None)
    assert described[1].labels.tolist() == [sample.label for sample in order.samples], order.name
    return described


class _HashingWriter:
    """A stream that passes writes on, hashes them and counts their bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self._stream.write(data)


def _write_shard(order: Order) -> Described:
    offsets, crcs = [], []
    with storage.create(storage.join(order.root, order.name)) as stream:
        hashing = _HashingWriter(stream)
        # Fixed owner, mode and time: the bytes depend on the samples alone.
        with TarWriter(hashing, user="", group="", mtime=0, encoder=False, compress=False) as writer:
            for sample in order.samples:
                data = sample.item.read()
                image = extension(data, sample.name)
                offsets.append(int(writer.tarstream.offset))
                crcs.append(zlib.crc32(data))
                key = _key(sample.number, sample.name)
                writer.write({"__key__": key, image: data, "cls": str(sample.label).encode()})
    labels = np.array([sample.label for sample in order.samples], np.int64)
    rows = Rows(np.array(offsets, np.int64), labels, np.array(crcs, np.int64))
    return Shard(order.name, len(labels), hashing.bytes, hashing.digest.hexdigest()), rows


def _key(number: int, name: str) -> str:
    """A key without dots (WebDataset ends a key at the first) that still tells which file the image was."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", PurePosixPath(name).stem)[:60]
    return f"{number:08d}-{stem}" if stem else f"{number:08d}"
