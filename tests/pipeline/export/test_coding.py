import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.export import coding, unpack
from pipeline.export.coding import Choice

unsigned = st.sampled_from(["<u1", "<u2", "<u4", "<u8"])


def gaps_of(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.uint32)


def test_survivors_are_values_and_the_zeros_before_them() -> None:
    gaps, values = coding.survivors(np.array([0, 7, 0, 0, 9, 8, 0], dtype=np.uint16))
    assert gaps.tolist() == [1, 2, 0]
    assert values.tolist() == [7, 9, 8]
    assert values.dtype == np.uint16


def test_survivors_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    elements = np.zeros(40, dtype=np.uint8)
    elements[[3, 4, 31, 39]] = [1, 2, 3, 4]
    whole = coding.survivors(elements)
    monkeypatch.setattr(coding, "BLOCK", 4)
    for found, wanted in zip(coding.survivors(elements), whole, strict=True):
        assert found.tolist() == wanted.tolist()
    assert whole[0].tolist() == [3, 0, 26, 7]


def test_bits_by_hand() -> None:
    # 1, 001, 01: places 0, 3 and 5, so 1 + 8 + 32
    assert coding.unary(gaps_of(0, 2, 1)).tolist() == [41]
    # 1, 2, 3 are 01, 10, 11: low bits 1 0 1, high bits 0 1 1
    assert [plane.tolist() for plane in coding.planes(gaps_of(1, 2, 3), 2)] == [[0b101], [0b110]]
    assert unpack.numbers(np.array([0b101, 0b110], np.uint8), 3, 2).tolist() == [1, 2, 3]


def test_fillers_by_hand() -> None:
    # at 2 bits a gap of 9 is two fillers that bridge 4 places each, and a gap of 1
    gaps, values = coding.bridge(gaps_of(3, 9), np.array([5, 6], np.uint8), 4, 2)
    assert gaps.tolist() == [3, 3, 3, 1]
    assert values.tolist() == [5, 0, 0, 6]


def test_the_choice_by_hand() -> None:
    """64 elements of 4 bytes, gaps 5, 0, 20: Rice at width 1 takes 15 bits of unary and one plane of 3 bits."""
    assert coding.choose(gaps_of(5, 0, 20), 64, 4) == Choice("rice", 1, 3, 2 + 1 + 12)
    assert coding.choose(gaps_of(), 64, 4) == Choice("relative", 1, 0, 0)
    assert coding.choose(gaps_of(), 0, 4) == Choice("dense", 0, 0, 0)
    assert coding.choose(gaps_of(0, 0, 0), 3, 4) == Choice("dense", 0, 3, 12)
    # one gap that no width holds: Rice's longest remainder, and 2^30 >> 20 bits of unary
    assert coding.choose(gaps_of(2**30), 2**31, 4).total_bytes <= math.ceil(1025 / 8) + 20 + 4


sparse_elements = st.lists(st.tuples(st.integers(0, 300) | st.just(70_000), st.integers(1, 255)), max_size=40)


@settings(deadline=None)
@given(sparse_elements, st.integers(0, 50), unsigned)
def test_every_coding_has_the_size_foretold_and_gives_the_elements_back(
    content: list[tuple[int, int]], tail: int, dtype: str
) -> None:
    elements = np.zeros(sum(gap + 1 for gap, _ in content) + tail, dtype)
    elements[np.cumsum([gap + 1 for gap, _ in content], dtype=int) - 1] = [value for _, value in content]
    item, numel = elements.itemsize, len(elements)
    gaps, values = coding.survivors(elements)
    best = coding.choose(gaps, numel, item)
    sizes = {}
    for coding_name, widths in (("dense", [0]), ("bitmask", [0]), ("relative", [1, 3, 8, 16]), ("rice", [1, 2, 7, 20])):
        for width in {*widths, best.width} if coding_name == best.coding else widths:
            kept = len(values) + (coding.quotient_sums(gaps)[width] if coding_name == "relative" else 0)
            entries = numel if coding_name == "dense" else kept
            parts = list(coding.encode(Choice(coding_name, width, entries, 0), elements, gaps, values))
            payload = np.concatenate([part.view(np.uint8) for part in parts])
            sizes[coding_name, width] = len(payload)
            name = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}[item]
            entry = unpack.PackedTensor("w", (numel,), name, coding_name, width, entries, len(payload), b"")
            if entries <= numel:
                assert unpack.consistent(entry)
                assert unpack.decode(entry, payload).view(dtype).tolist() == elements.tolist()
    assert sizes[best.coding, best.width] == best.total_bytes == min(sizes.values())
