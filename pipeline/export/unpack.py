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

Version 3, for files with shared values, is the same but for its header, which comes after the payload and is shorter:
of each tensor number(length of the name), the name, uint8 dtype, uint8 coding, uint8 width, number(dimensions), each
dimension, entries and length as number(), and the first 8 bytes of its payload's SHA-256. number() is seven bits a
byte, the lowest first, and the highest bit is 1 in all bytes but the last.

Elements are flattened in C order, and "zero" means all bits 0 (so -0.0 and NaN survive). Bits stand least significant
first, and each stream of them ends on a byte. A gap is the number of zeros skipped; trailing zeros are not stored. A
number of `width` bits is spread over as many planes, the plane of its lowest bit first, one bit an entry in each.

    dense     no index; the values are all elements
    bitmask   one bit an element; the values are those whose bit is 1
    relative  planes of the gaps. A gap too long for the width is bridged by fillers, entries whose gap is the largest
              and whose value is 0 (Han et al. 2015, section 3, at the width that suits the tensor)
    rice      gap >> width in unary (so many 0s and a 1), then planes of the gap's low `width` bits (Golomb-Rice)
    shared    the values come from a codebook, and places and values are entropy-coded (Han et al. 2016; version 3):
              number(the index's bytes), the index, number(values in the codebook), the codebook in the form `width`
              (0 the dtype itself, 1 fp16, 2 bf16), and a stream of each entry's place in it, less 1
      index   uint8 0, and a stream of the gaps; or uint8 1 or 2, a bit a row (a place in the first dimension) and a
              bit a column (one in all others), 1 where there are entries, and a stream of the gaps without the rows
              and columns that have none, in the order of the elements (1) or column by column (2)
      stream  uint8 m, uint8 k, number(tokens), how often in 2^k each token comes, as Elias gamma codes of that + 1,
              then rANS: number(words), a uint32 state a lane, and the uint16 words; last the tokens' low bits. A number
              below 2^(m+1) is its own token; of others the token holds the place of the highest bit and the m bits
              that follow it, and the rest, the low bits, is stored as it is. Lane i of n has symbols i, i + n, ...
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
SHARED_VERSION = 3
PRELUDE = struct.Struct("<8sIIQ32s")
ENTRY = struct.Struct("<HBBBBQQ32s")
CODINGS = ("dense", "bitmask", "relative", "rice", "shared")
RELATIVE_WIDTHS = range(1, 17)
RICE_WIDTHS = range(1, 21)
BOOKS = (None, "<f2", "<u2")  # how a codebook is stored: as the tensor's dtype, as fp16, or as bf16
MOST_TOKENS = 512
MOST_SCALE = 14
MOST_FINE = 3  # of `m`
LANE = 2048  # symbols of a lane of rANS: lanes are decoded side by side
LOWEST = 2**16  # a state between symbols is LOWEST or more; below it the next word is taken in
FLAT, BY_ROW, BY_COLUMN = range(3)  # the order of shared values in a tensor
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
PER_BYTE = 64  # entries that a byte of shared values may stand for, at the most
MAX_ELEMENTS = 2**36  # of one tensor: keeps every sum of gaps below 2^63

Raw = NDArray[np.uint8]


class Damaged(ValueError):
    """What is wrong with a packed file and what to do, without the file's name."""


@dataclass(frozen=True)
class PackedTensor:
    """One tensor in the header. `length` is the bytes of its payload, `digest` their SHA-256, or its first 8 bytes."""

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
    newest = SHARED_VERSION
    require(version <= newest, f"its version {version} is newer than {newest}, the newest known", "update secateur")
    require(version >= VERSION, f"its version {version} is no longer read, only {VERSION} to {newest}", "write it anew")
    size = os.fstat(file.fileno()).st_size
    rest = size - PRELUDE.size - length
    require(rest >= 0, f"it was cut, or the length of its header ({length:,} bytes) is false")
    last = version == SHARED_VERSION
    require(not last or rest >= payload, f"it was cut: its payload is {rest:,} bytes of {payload:,}")
    file.seek(PRELUDE.size + (payload if last else 0))
    text = file.read(length)
    require(hashlib.sha256(text).digest() == digest, "its header was altered: its SHA-256 differs")
    require(rest >= payload, f"it was cut: its payload is {rest:,} bytes of {payload:,}")
    require(rest == payload, f"it was padded: {rest - payload:,} bytes follow its end")
    file.seek(PRELUDE.size + (0 if last else length))
    entries = parse_short(text) if last else parse(text)
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
        known = dtype < len(DTYPES) and coding < CODINGS.index("shared")
        require(known, f"tensor {name!r} has an unknown dtype or coding")
        shape = struct.unpack_from(f"<{dims}Q", text, offset + name_length)
        entries.append(checked(name, shape, dtype, coding, width, kept, length, digest))
        offset = end
    return entries


def parse_short(text: bytes) -> list[PackedTensor]:
    """The tensors of a header of version 3, each one consistent in itself."""
    entries, part = [], Reader(np.frombuffer(text, np.uint8), "its header ends within a tensor")
    while part.left:
        try:
            name = part.take(part.number()).tobytes().decode()
        except UnicodeDecodeError:
            raise Damaged("a name in its header is not UTF-8; write it anew") from None
        dtype, coding, width = part.take(3).tolist()
        require(dtype < len(DTYPES) and coding < len(CODINGS), f"tensor {name!r} has an unknown dtype or coding")
        dims = part.number()
        require(dims <= 64, f"tensor {name!r} is too large")
        shape = tuple(part.number() for _ in range(dims))
        kept, length = part.number(), part.number()
        entries.append(checked(name, shape, dtype, coding, width, kept, length, part.take(8).tobytes()))
    return entries


def checked(
    name: str, shape: tuple[int, ...], dtype: int, coding: int, width: int, kept: int, length: int, digest: bytes
) -> PackedTensor:
    """A tensor of the header. Raises Damaged where it is too large, or contradicts itself."""
    entry = PackedTensor(name, shape, list(DTYPES)[dtype], CODINGS[coding], width, kept, length, digest)
    small = len(shape) <= 64 and math.prod(max(d, 1) for d in shape) <= MAX_ELEMENTS
    require(small, f"tensor {name!r} is too large")
    require(consistent(entry), f"the sizes of tensor {name!r} contradict each other")
    return entry


def consistent(entry: PackedTensor) -> bool:
    """Whether coding, width and lengths can belong together."""
    if entry.coding == "dense":
        return entry.width == 0 and entry.entries == entry.numel and entry.length == entry.numel * entry.item
    if entry.coding == "shared":
        forms = len(BOOKS) if entry.dtype == "float32" else 1
        fits = entry.entries <= min(entry.numel, PER_BYTE * entry.length)
        return entry.item in UNSIGNED and entry.width < forms and fits
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
    intact = hashlib.sha256(part.data).digest()[: len(entry.digest)] == entry.digest
    require(intact, f"tensor {entry.name!r} was altered: its SHA-256 differs from the header's")
    return decode(entry, part)


def decode(entry: PackedTensor, part: Raw) -> Raw:
    """The bytes of a tensor's elements, from its payload; they may be the payload's own."""
    if entry.coding == "shared":
        raw = decode_shared(entry, part)
    elif entry.coding == "dense":
        raw = part
    else:
        index, values = np.split(part, [entry.length - entry.entries * entry.item])
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


class Reader:
    """Reads bytes one part after the other. Raises Damaged with `problem` where they end too early."""

    def __init__(self, data: Raw, problem: str) -> None:
        self.data, self.problem, self.place = data, problem, 0

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self.data) - self.place

    def take(self, count: int) -> Raw:
        """The next `count` bytes."""
        require(count <= self.left, self.problem)
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self) -> int:
        """The next number(), below 2^63."""
        found = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1).tolist()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise Damaged(f"{self.problem}; write it anew")


def decode_shared(entry: PackedTensor, part: Raw) -> Raw:
    """The bytes of the elements of a tensor with shared values."""
    values: NDArray[Any]
    damaged = f"the shared values of tensor {entry.name!r} are damaged"
    payload = Reader(part, damaged)
    found = shared_places(entry, Reader(payload.take(payload.number()), damaged))
    size = payload.number()
    require(size <= MOST_TOKENS, damaged)
    form = BOOKS[entry.width]
    book = payload.take(size * (entry.item if form is None else 2)).tobytes()
    values = np.frombuffer(book, UNSIGNED[entry.item] if form is None else form)
    if form == "<f2":  # of a float32, as below
        values = values.astype("<f4").view("<u4")
    elif form == "<u2":
        values = values.astype("<u4") << np.uint32(16)
    chosen = stream(payload, entry.entries)
    require(payload.left == 0 and (entry.entries == 0 or int(chosen.max()) < size), damaged)
    elements = np.zeros(entry.numel, UNSIGNED[entry.item])
    elements[found] = values[chosen]
    return elements.view(np.uint8)


def shared_places(entry: PackedTensor, index: Reader) -> NDArray[np.int64]:
    """The places of the shared values among the elements, in the order in which they are stored."""
    (how,) = index.take(1).tolist()
    require(how in (FLAT, BY_ROW, BY_COLUMN) and entry.numel > 0 and len(entry.shape) > 0, index.problem)
    rows = entry.shape[0]
    columns = entry.numel // rows
    lines = [np.flatnonzero(bits(index.take((size + 7) // 8), size)) for size in (rows, columns) if how != FLAT]
    room = math.prod(map(len, lines)) if lines else entry.numel
    gaps = stream(index, entry.entries)
    last = gaps.sum(dtype=np.float64) + entry.entries  # where int64 could overflow, this is still large
    require(index.left == 0 and last <= room, f"an index of tensor {entry.name!r} is out of bounds")
    found: NDArray[np.int64] = np.cumsum(gaps, dtype=np.int64) + np.arange(entry.entries)
    if not lines:
        return found
    if how == BY_ROW:
        row, column = np.divmod(found, max(1, len(lines[1])))
    else:
        column, row = np.divmod(found, max(1, len(lines[0])))
    return lines[0][row] * columns + lines[1][column]


def stream(part: Reader, count: int) -> NDArray[np.int64]:
    """The next stream of `count` numbers."""
    if count == 0:
        return np.zeros(0, np.int64)
    fine, scale = part.take(2).tolist()
    tokens = part.number()
    require(fine <= MOST_FINE and scale <= MOST_SCALE and 0 < tokens <= MOST_TOKENS, part.problem)
    found = rans(part, count, frequencies(part, tokens, scale), scale)
    every, direct = np.arange(tokens, dtype=np.int64), 2 << fine
    low = np.where(every < direct, 0, (every - direct >> fine) + 1)  # the low bits of each token
    require(int(low.max()) <= 36, part.problem)
    base = np.where(every < direct, every, every % (1 << fine) + (1 << fine) << low)
    widths = low[found]
    ends = np.cumsum(widths)
    total = int(ends[-1])
    given = bits(part.take((total + 7) // 8), total)
    numbers = base[found]
    for bit in range(int(widths.max())):
        there = np.flatnonzero(widths > bit)
        numbers[there] |= given[(ends - widths)[there] + bit].astype(np.int64) << bit
    return numbers


def frequencies(part: Reader, tokens: int, scale: int) -> NDArray[np.int64]:
    """How often in 2^scale each token comes: the next Elias gamma codes, of the frequencies + 1."""
    found: list[int] = []
    zeros, value, missing = 0, 0, 0
    while len(found) < tokens:
        (byte,) = part.take(1).tolist()
        for bit in range(8):
            one = byte >> bit & 1
            if missing:
                value, missing = 2 * value + one, missing - 1
            elif one:
                value, missing = 1, zeros
            else:
                zeros += 1
                require(zeros <= MOST_SCALE, part.problem)
                continue
            if not missing:
                found.append(value - 1)
                zeros = 0
                if len(found) == tokens:
                    break
    require(sum(found) == 1 << scale, part.problem)
    return np.array(found, np.int64)


def rans(part: Reader, count: int, often: NDArray[np.int64], scale: int) -> NDArray[np.int64]:
    """The next `count` tokens, coded by range asymmetric numeral systems with these frequencies (Duda 2013)."""
    if int(often.max()) == 1 << scale:  # only one token: nothing is stored
        return np.full(count, int(often.argmax()), np.int64)
    words_there, lanes = part.number(), 1 + count // LANE
    state = np.frombuffer(part.take(4 * lanes).tobytes(), "<u4").astype(np.int64)
    words = np.frombuffer(part.take(2 * words_there).tobytes(), "<u2").astype(np.int64)
    require(bool((state >= LOWEST).all()), part.problem)
    token = np.repeat(np.arange(len(often)), often)  # of each of the 2^scale numbers
    within = np.arange(1 << scale) - (np.cumsum(often) - often)[token]
    width = often[token]
    found = np.empty(count, np.int64)
    place, mask = 0, (1 << scale) - 1
    for start in range(0, count, lanes):
        here = state[: count - start]  # fewer in the last step
        slot = here & mask
        found[start : start + lanes] = token[slot]
        here[:] = width[slot] * (here >> scale) + within[slot]
        short = np.flatnonzero(here < LOWEST)
        require(place + len(short) <= len(words), part.problem)
        here[short] = here[short] << 16 | words[place : place + len(short)]
        place += len(short)
    require(place == len(words) and bool((state == LOWEST).all()), part.problem)
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
