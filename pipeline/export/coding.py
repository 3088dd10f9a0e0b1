"""Index codings: the positions of a tensor's non-zero elements in the fewest bytes. Arrays in, bytes out.

`unpack.py` describes the codings and decodes them. For random masks, whose gaps are geometric, Golomb-Rice stays within
4.3% of the entropy at every density. The worst density is 38%, from which on the bitmask is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.export.unpack import RELATIVE_WIDTHS, RICE_WIDTHS

BLOCK = 2**20  # elements searched at a time
COMMON = 2**16  # gaps below it are counted in a histogram, longer ones are few

Elements = NDArray[np.unsignedinteger[Any]]
Gaps = NDArray[np.integer[Any]]
Packed = NDArray[np.uint8]


@dataclass(frozen=True)
class Choice:
    """A coding and its size: `entries` values, fillers counted, and the bytes in all."""

    coding: str
    width: int
    entries: int
    total_bytes: int


def survivors(elements: Elements) -> tuple[Gaps, Elements]:
    """The non-zero elements and, for each, the number of zeros skipped to get to it."""
    kept = np.count_nonzero(elements)
    gaps: Gaps = np.empty(kept, np.uint32 if len(elements) < 2**32 else np.uint64)
    values = np.empty(kept, elements.dtype)
    done, last = 0, -1
    for start in range(0, len(elements), BLOCK):
        block = elements[start : start + BLOCK]
        places = np.flatnonzero(block != 0)
        end = done + len(places)
        if end == done:
            continue
        values[done:end] = block[places]
        places += start
        gaps[done:end] = np.diff(places, prepend=last) - 1
        done, last = end, int(places[-1])
    return gaps, values


def choose(gaps: Gaps, numel: int, item: int) -> Choice:
    """The smallest coding for `numel` elements of `item` bytes, the simplest where sizes are equal."""
    kept = len(gaps)
    quotients = quotient_sums(gaps)
    plane = (kept + 7) // 8
    options = [
        Choice("dense", 0, numel, numel * item),
        Choice("bitmask", 0, kept, (numel + 7) // 8 + kept * item),
    ]
    for width in RELATIVE_WIDTHS:
        entries = kept + quotients[width]
        options.append(Choice("relative", width, entries, width * ((entries + 7) // 8) + entries * item))
    for width in RICE_WIDTHS:
        unary = (kept + quotients[width] + 7) // 8
        options.append(Choice("rice", width, kept, unary + width * plane + kept * item))
    return min(options, key=lambda choice: choice.total_bytes)


def quotient_sums(gaps: Gaps) -> list[int]:
    """The sum of gap >> width, for every width from 0 on: the fillers of relative indices, the 0s of Rice's unary."""
    counts = np.bincount(gaps[gaps < COMMON].astype(np.int64))
    lengths = np.arange(len(counts))
    long = gaps[gaps >= COMMON]
    return [int(counts @ (lengths >> width)) + int((long >> width).sum()) for width in range(max(RICE_WIDTHS) + 1)]


def encode(choice: Choice, elements: Elements, gaps: Gaps, values: Elements) -> Iterator[NDArray[Any]]:
    """The parts of a tensor's payload, in order."""
    if choice.coding == "dense":
        yield elements
    elif choice.coding == "bitmask":
        yield pack(elements != 0)
        yield values
    elif choice.coding == "relative":
        all_gaps, all_values = bridge(gaps, values, choice.entries, choice.width)
        yield from planes(all_gaps, choice.width)
        yield all_values
    else:
        yield unary(gaps >> choice.width)
        yield from planes(gaps, choice.width)
        yield values


def bridge(gaps: Gaps, values: Elements, entries: int, width: int) -> tuple[Gaps, Elements]:
    """Gaps and values with fillers put in: before a gap of g go g >> width of them, each bridging 2^width places."""
    ends = np.cumsum((gaps >> width) + 1, dtype=np.int64) - 1
    all_gaps = np.full(entries, 2**width - 1, dtype=gaps.dtype)
    all_gaps[ends] = gaps & (2**width - 1)
    all_values = np.zeros(entries, dtype=values.dtype)
    all_values[ends] = values
    return all_gaps, all_values


def unary(numbers: Gaps) -> Packed:
    """The unary code of each number: that many 0 bits, then one 1 bit."""
    ends = np.cumsum(numbers, dtype=np.int64) + np.arange(len(numbers))
    ones = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.bool_)
    ones[ends] = True
    return pack(ones)


def planes(numbers: Gaps, width: int) -> Iterator[Packed]:
    """The lowest bits of all numbers, then the next ones, `width` times."""
    for bit in range(width):
        yield pack((numbers & (1 << bit)) != 0)


def pack(flags: NDArray[np.bool_]) -> Packed:
    """Eight flags a byte, the first in the lowest bit."""
    return np.packbits(flags, bitorder="little")
