"""Tensors whose values are shared: codebook, places and choices in the fewest bytes. Arrays in, bytes out.

`unpack.py` describes the coding and reads it. Streams are coded by rANS, which comes within a few bytes of the entropy.
With a small scale its table is as short as a Huffman code's, which spends whole bits on each symbol: so none is tried
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.export.coding import Elements, Gaps, pack, survivors
from pipeline.export.unpack import BOOKS, BY_COLUMN, BY_ROW, FLAT, LANE, LOWEST, MOST_FINE, MOST_TOKENS, PER_BYTE

Numbers = NDArray[np.int64]
LARGEST_BOOK = 256  # values in a codebook; a tensor with more has no shared values
SCALES = range(5, 15)


@dataclass(frozen=True)
class Shared:
    """A tensor with shared values as bytes. `entries` elements are not zero; the index has `index_bytes`.

    `form` is that of the codebook (a place in BOOKS). `bound` is the entropy of order zero in bits: of a random mask of
    this density, and of the values in their proportions. Rows and columns that are empty can bring the file below it.
    """

    payload: bytes
    form: int
    entries: int
    index_bytes: int
    bound: float


def encode(elements: Elements, shape: tuple[int, ...], kind: str) -> Shared | None:
    """The shared coding of flat elements, as plain numbers, of dtype `kind`; None where values are not shared."""
    gaps, values = survivors(elements)
    book, chosen = few_values(values)
    if not 0 < len(book) <= LARGEST_BOOK:
        return None
    index, order = min((ordered(how, elements, shape, gaps) for how in orders(shape)), key=lambda found: len(found[0]))
    chosen = chosen if order is None else chosen[order]
    form, stored = smallest_form(book, kind)
    payload = number(len(index)) + index + number(len(book)) + stored + stream(chosen)
    if len(values) > PER_BYTE * len(payload):
        return None
    bound = mask_entropy(len(values), len(elements)) + entropy(np.bincount(chosen))
    return Shared(payload, form, len(values), len(index), bound)


def few_values(values: Elements) -> tuple[Elements, Numbers]:
    """The distinct values, rising, and the place of each value among them. Of too many only some, quickly."""
    some = np.unique(values[: 4 * LARGEST_BOOK])
    if len(some) > LARGEST_BOOK:
        return some, np.zeros(0, np.int64)
    book, chosen = np.unique(values, return_inverse=True)
    return book, chosen.astype(np.int64)


def smallest_form(book: Elements, kind: str) -> tuple[int, bytes]:
    """The shortest form of a codebook that is exact to the bit, and its bytes."""
    if kind == "float32":
        wide = book.astype("<u4")
        with np.errstate(over="ignore", invalid="ignore"):
            half = wide.view("<f4").astype("<f2")
        if np.array_equal(half.astype("<f4").view("<u4"), wide):
            return 1, half.astype(BOOKS[1]).tobytes()
        if not (wide & 0xFFFF).any():
            return 2, (wide >> 16).astype(BOOKS[2]).tobytes()
    return 0, book.tobytes()


def orders(shape: tuple[int, ...]) -> Iterator[int]:
    """The orders that are tried: by row and by column only where there are both."""
    yield FLAT
    if len(shape) > 1:
        yield BY_ROW
        yield BY_COLUMN


def ordered(how: int, elements: Elements, shape: tuple[int, ...], gaps: Gaps) -> tuple[bytes, Numbers | None]:
    """The index in one order, and the places of its entries among the entries in the order of the elements."""
    if how == FLAT:
        return bytes([how]) + stream(gaps.astype(np.int64)), None
    rows, columns = shape[0], len(elements) // shape[0]
    there = np.flatnonzero(elements)
    row, column = np.divmod(there, columns)
    masks, numbers, sizes = [], [], []
    for line, size in ((row, rows), (column, columns)):
        used = np.zeros(size, np.bool_)
        used[line] = True
        masks.append(pack(used).tobytes())
        numbers.append((np.cumsum(used) - 1)[line])
        sizes.append(int(used.sum()))
    if how == BY_ROW:
        places, order = numbers[0] * sizes[1] + numbers[1], None
    else:
        places = numbers[1] * sizes[0] + numbers[0]
        order = np.argsort(places, kind="stable")
        places = places[order]
    return bytes([how]) + b"".join(masks) + stream(np.diff(places, prepend=-1) - 1), order


def number(value: int) -> bytes:
    """A whole number, seven bits a byte, the lowest first."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def stream(numbers: Numbers) -> bytes:
    """Numbers as a stream, with the tokens and the scale that make it shortest."""
    if not len(numbers):
        return b""
    tried = []
    for fine in range(MOST_FINE + 1):
        token, low = tokens(numbers, fine)
        counts = np.bincount(token)
        if len(counts) <= MOST_TOKENS:
            tried += [(size + int(low.sum()) / 8, fine, scale) for scale, size in sizes(counts)]
    _, fine, scale = min(tried)
    token, low = tokens(numbers, fine)
    often = scaled(np.bincount(token), scale)
    head = bytes([fine, scale]) + number(len(often)) + gamma(often + 1)
    return head + rans(token, often, scale) + low_bits(numbers, low)


def tokens(numbers: Numbers, fine: int) -> tuple[Numbers, Numbers]:
    """Each number's token, and how many low bits are stored beside it: see `unpack.stream`."""
    high = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1  # exact below 2^53; -1 for 0
    low = np.maximum(high - fine, 0)
    token = numbers >> low
    token += np.where(low > 0, low << fine, 0)
    return token, low


def sizes(counts: Numbers) -> Iterator[tuple[int, float]]:
    """Scales, and the bytes that table and tokens take at each."""
    there = np.flatnonzero(counts)
    if len(there) == 1:
        yield 0, 2.0
        return
    for scale in SCALES:
        if len(there) <= 1 << scale:
            often = scaled(counts, scale)
            bits = float(counts[there] @ (scale - np.log2(often[there])))
            yield scale, bits / 8 + len(gamma(often + 1))


def scaled(counts: Numbers, scale: int) -> Numbers:
    """Frequencies that sum to 2^scale, in proportion to the counts, at least 1 where there is one.

    What rounding leaves over or lacks goes, one by one, to where it makes the code shortest.
    """
    total, there = 1 << scale, counts > 0
    exact = counts * (total / counts.sum())
    often = np.where(there, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    while (missing := total - int(often.sum())) != 0:
        step = 1 if missing > 0 else -1
        able = there & (often + step > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(able, counts * np.log2((often + step) / often), -np.inf)
        best = np.argsort(-gain, kind="stable")[: max(1, min(abs(missing), int(able.sum())) // 4)]
        often[best] += step
    return often


def gamma(numbers: Numbers) -> bytes:
    """Elias gamma codes of numbers from 1 on: as many 0s as bits follow the first, then the bits, the highest first."""
    flags: list[bool] = []
    for each in numbers.tolist():
        width = each.bit_length()
        flags += [False] * (width - 1) + [bool(each >> bit & 1) for bit in reversed(range(width))]
    return pack(np.array(flags, np.bool_)).tobytes()


def rans(token: Numbers, often: Numbers, scale: int) -> bytes:
    """Tokens by rANS over several lanes, from the last to the first, so that they are read from the first on."""
    if int(often.max()) == 1 << scale:
        return b""
    count, lanes = len(token), 1 + len(token) // LANE
    below, state = np.cumsum(often) - often, np.full(lanes, LOWEST, np.int64)
    words: list[NDArray[Any]] = []
    for start in reversed(range(0, count, lanes)):
        now = token[start : start + lanes]
        here, width = state[: len(now)], often[now]
        full = here >= width << (32 - scale)
        words.append((here[full] & 0xFFFF).astype("<u2"))
        here[full] >>= 16
        here[:] = ((here // width) << scale) + here % width + below[now]
    spilt = np.concatenate(words[::-1])
    return number(len(spilt)) + state.astype("<u4").tobytes() + spilt.tobytes()


def low_bits(numbers: Numbers, low: Numbers) -> bytes:
    """The low bits of all numbers, one after the other, the lowest first."""
    ends = np.cumsum(low)
    flags = np.zeros(int(ends[-1]), np.bool_)
    for bit in range(int(low.max())):
        there = np.flatnonzero(low > bit)
        flags[(ends - low)[there] + bit] = numbers[there] >> bit & 1
    return pack(flags).tobytes()


def entropy(counts: Numbers) -> float:
    """Bits of so many symbols of each kind at their proportions."""
    some = counts[counts > 0]
    return float(some @ (math.log2(some.sum()) - np.log2(some))) if len(some) else 0.0


def mask_entropy(kept: int, numel: int) -> float:
    """Bits of a random mask that keeps so many of so many elements."""
    return entropy(np.array([kept, numel - kept]))
