"""Reader of packed files, in this one file: Python 3.11 and numpy, torch only where tensors are asked for.

    python unpack.py model.packed              list what is in it
    python unpack.py model.packed model.npz    unpack it for numpy

It imports nothing of secateur, so a copy of it reads a packed file anywhere. All numbers are little-endian:

    bytes 0-7    magic "SECPACK\\n"
    bytes 8-11   uint32 version
    bytes 12-15  uint32 length of the header
    bytes 16-23  uint64 length of the payload
    bytes 24-55  SHA-256 of the header
    header       for each tensor: uint16 length of the name, uint8 dtype (its place in DTYPES), uint8 coding (its place
                 in CODINGS), uint8 width, uint8 number of dimensions, uint64 entries, uint64 length of its payload,
                 SHA-256 of its payload, the name in UTF-8, uint64 for each dimension
    payload      the tensors in the header's order: of each its index, then its values

Elements are flattened in C order, and "zero" means all bits 0 (so -0.0 and NaN survive). Bits stand least significant
first, and each stream of them ends on a byte. A gap is the number of zeros skipped; trailing zeros are not stored. A
number of `width` bits is spread over as many planes, the plane of its lowest bit first, one bit an entry in each.

    dense     no index; the values are all elements
    bitmask   one bit an element; the values are those whose bit is 1
    relative  planes of the gaps. A gap too long for the width is bridged by fillers, entries whose gap is the largest
              and whose value is 0 (Han et al. 2015, section 3, at the width that suits the tensor)
    rice      gap >> width in unary (so many 0s and a 1), then planes of the gap's low `width` bits (Golomb-Rice)
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"SECPACK\n"
VERSION = 2
PRELUDE = struct.Struct("<8sIIQ32s")
ENTRY = struct.Struct("<HBBBBQQ32s")
CODINGS = ("dense", "bitmask", "relative", "rice")
RELATIVE_WIDTHS = range(1, 17)
RICE_WIDTHS = range(1, 21)
DTYPES = {  # name, as in torch, and bytes of an element
    "float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
UNSIGNED = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}  # an element as a plain number; wider ones are only stored dense

# A few bytes can name a huge tensor of zeros, so a file may only unpack to so many bytes: FREE, or EXPANSION times the
# file. 32-bit values at a density of 1 in 1,000 are about 750 times smaller than the tensor.
FREE_BYTES = 2**30
EXPANSION = 1024
MAX_ELEMENTS = 2**36  # of one tensor: keeps every sum of gaps below 2^63

Raw = NDArray[np.uint8]


class Damaged(ValueError):
    """What is wrong with a packed file and what to do, without the file's name."""


@dataclass(frozen=True)
class PackedTensor:
    """One tensor in the header. `length` is the bytes of its payload, `digest` their SHA-256."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    width: int
    entries: int
    length: int
    digest: bytes

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype]


def load(path: str | Path) -> dict[str, NDArray[Any]]:
    """The tensors of a packed file. Numpy has no bfloat16, which widens to float32, exactly; float8 stays raw uint8."""
    return {entry.name: to_numpy(entry, raw) for entry, raw in iterate(path)}


def load_torch(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a packed file, to the bit."""
    return {entry.name: to_torch(entry, raw) for entry, raw in iterate(path)}


def iterate(path: str | Path, most: int | None = None) -> Iterator[tuple[PackedTensor, Raw]]:
    """The tensors one at a time, as the bytes of their elements: only one is held in memory.

    `most`: bytes that the file may unpack to; by default what FREE_BYTES and EXPANSION allow. Raises Damaged before
    memory is taken for a length that cannot be true, and before a tensor that was altered is decoded.
    """
    with open(path, "rb") as file:
        for entry in read_header(file, most):
            yield entry, read_tensor(file, entry)


def require(condition: bool, problem: str, remedy: str = "fetch it again, or write it anew") -> None:
    """Raise Damaged unless the condition holds."""
    if not condition:
        raise Damaged(f"{problem}; {remedy}")


def read_header(file: BinaryIO, most: int | None = None) -> list[PackedTensor]:
    """The tensors that a packed file holds, their lengths checked against each other and against the file's."""
    start = file.read(PRELUDE.size)
    require(start.startswith(MAGIC), "it is not a packed file", "give a file that secateur wrote")
    require(len(start) == PRELUDE.size, "it was cut within its first bytes")
    _, version, length, payload, digest = PRELUDE.unpack(start)
    require(version <= VERSION, f"its version {version} is newer than {VERSION}, the newest known", "update secateur")
    require(version == VERSION, f"its version {version} is no longer read, only {VERSION} is", "write it anew")
    size = os.fstat(file.fileno()).st_size
    rest = size - PRELUDE.size - length
    require(rest >= 0, f"it was cut, or the length of its header ({length:,} bytes) is false")
    text = file.read(length)
    require(hashlib.sha256(text).digest() == digest, "its header was altered: its SHA-256 differs")
    require(rest >= payload, f"it was cut: its payload is {rest:,} bytes of {payload:,}")
    require(rest == payload, f"it was padded: {rest - payload:,} bytes follow its end")
    entries = parse(text)
    require(sum(entry.length for entry in entries) == payload, "its tensors do not fill the payload")
    require(len({entry.name for entry in entries}) == len(entries), "two of its tensors have one name")
    total = sum(entry.numel * entry.item for entry in entries)
    most = max(FREE_BYTES, EXPANSION * size) if most is None else most
    remedy = "if you trust it, read it with a higher limit (most=...)"
    require(total <= most, f"it would unpack to {total:,} bytes, more than the limit of {most:,}", remedy)
    return entries


def parse(text: bytes) -> list[PackedTensor]:
    """The header's tensors, each one consistent in itself."""
    entries = []
    offset = 0
    while offset < len(text):
        require(offset + ENTRY.size <= len(text), "its header ends within a tensor")
        name_length, dtype, coding, width, dims, kept, length, digest = ENTRY.unpack_from(text, offset)
        offset += ENTRY.size
        end = offset + name_length + 8 * dims
        require(end <= len(text), "its header ends within a tensor")
        try:
            name = text[offset : offset + name_length].decode()
        except UnicodeDecodeError:
            raise Damaged("a name in its header is not UTF-8; write it anew") from None
        require(dtype < len(DTYPES) and coding < len(CODINGS), f"tensor {name!r} has an unknown dtype or coding")
        shape = struct.unpack_from(f"<{dims}Q", text, offset + name_length)
        entry = PackedTensor(name, shape, list(DTYPES)[dtype], CODINGS[coding], width, kept, length, digest)
        require(dims <= 64 and math.prod(max(d, 1) for d in shape) <= MAX_ELEMENTS, f"tensor {name!r} is too large")
        require(consistent(entry), f"the sizes of tensor {name!r} contradict each other")
        entries.append(entry)
        offset = end
    return entries


def consistent(entry: PackedTensor) -> bool:
    """Whether coding, width and lengths can belong together."""
    if entry.coding == "dense":
        return entry.width == 0 and entry.entries == entry.numel and entry.length == entry.numel * entry.item
    index = entry.length - entry.entries * entry.item
    if entry.item not in UNSIGNED or entry.entries > entry.numel or index < 0:
        return False
    if entry.coding == "bitmask":
        return entry.width == 0 and index == (entry.numel + 7) // 8
    planes = entry.width * ((entry.entries + 7) // 8)
    if entry.coding == "relative":
        return entry.width in RELATIVE_WIDTHS and index == planes
    longest = (entry.entries + (entry.numel >> entry.width) + 7) // 8
    return entry.width in RICE_WIDTHS and (entry.entries + 7) // 8 <= index - planes <= longest


def read_tensor(file: BinaryIO, entry: PackedTensor) -> Raw:
    """The bytes of the elements of the tensor whose payload comes next."""
    part = np.fromfile(file, np.uint8, entry.length)
    intact = hashlib.sha256(part.data).digest() == entry.digest
    require(intact, f"tensor {entry.name!r} was altered: its SHA-256 differs from the header's")
    return decode(entry, part)


def decode(entry: PackedTensor, part: Raw) -> Raw:
    """The bytes of a tensor's elements, from its payload; they may be the payload's own."""
    index, values = np.split(part, [entry.length - entry.entries * entry.item])
    if entry.coding == "dense":
        raw = part
    else:
        elements = np.zeros(entry.numel, UNSIGNED[entry.item])
        elements[places(entry, index)] = np.frombuffer(values.tobytes(), elements.dtype)
        raw = elements.view(np.uint8)
    require(entry.dtype != "bool" or not (raw > 1).any(), f"tensor {entry.name!r} holds bools other than 0 and 1")
    return raw


def places(entry: PackedTensor, index: Raw) -> NDArray[Any]:
    """The values' places: their positions in rising order, or a mask with as many True elements."""
    if entry.coding == "bitmask":
        mask = bits(index, entry.numel)
        require(np.count_nonzero(mask) == entry.entries, f"the mask of tensor {entry.name!r} does not fit its values")
        return mask
    order = np.arange(entry.entries)
    planes = entry.width * ((entry.entries + 7) // 8)
    found = np.cumsum(numbers(index[len(index) - planes :], entry.entries, entry.width), dtype=np.int64)
    found += order
    if entry.coding == "rice":
        unary = index[: len(index) - planes]
        ends = np.flatnonzero(bits(unary, 8 * len(unary)))
        require(len(ends) == entry.entries, f"the quotients of tensor {entry.name!r} do not fit its values")
        ends -= order  # the sum of all quotients so far
        ends <<= entry.width
        found += ends
    inside = entry.entries == 0 or int(found[-1]) < entry.numel
    require(inside, f"an index of tensor {entry.name!r} is out of bounds")
    return found


def bits(data: Raw, count: int) -> NDArray[np.bool_]:
    """The first `count` bits."""
    return np.unpackbits(data, count=count, bitorder="little").view(np.bool_)


def numbers(data: Raw, count: int, width: int) -> NDArray[np.uint32]:
    """`count` numbers from their planes."""
    found = np.zeros(count, np.uint32)
    for bit, plane in enumerate(data.reshape(width, -1) if count else ()):
        found |= bits(plane, count).astype(np.uint32) << np.uint32(bit)
    return found


def to_numpy(entry: PackedTensor, raw: Raw) -> NDArray[Any]:
    """The bytes of a tensor's elements as an array."""
    if entry.dtype == "bfloat16":
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").reshape(entry.shape)
    if entry.dtype.startswith("float8"):
        return raw.reshape(entry.shape)
    return raw.view(entry.dtype).reshape(entry.shape)


def to_torch(entry: PackedTensor, raw: Raw) -> Tensor:
    """The bytes of a tensor's elements as a tensor that shares them."""
    import torch

    dtype = getattr(torch, entry.dtype)
    if entry.numel == 0:
        return torch.empty(entry.shape, dtype=dtype)  # torch cannot view nothing
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)


def save_npz(path: str | Path, to: str | Path) -> None:
    """Unpack a file into an .npz, as np.savez would but for any names and one tensor at a time."""
    with zipfile.ZipFile(to, "w") as archive:
        for entry, raw in iterate(path):
            with archive.open(f"{entry.name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, to_numpy(entry, raw), allow_pickle=False)


def main() -> None:
    """List a packed file's tensors, or unpack them to an .npz."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    try:
        if len(sys.argv) == 3:
            save_npz(sys.argv[1], sys.argv[2])
            return
        with open(sys.argv[1], "rb") as file:
            for entry in read_header(file):
                print(f"{entry.name}  {entry.dtype}{list(entry.shape)}  {entry.coding}  {entry.length:,} bytes")
    except Damaged as error:
        raise SystemExit(f"packed file '{sys.argv[1]}' cannot be read: {error}") from None


if __name__ == "__main__":
    main()
