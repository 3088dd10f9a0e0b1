"""Shared values: by hand, against the entropy, and files that lie."""

from __future__ import annotations

import hashlib
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.export import packed, shared, unpack
from pipeline.export.unpack import PackedTensor, Reader

anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def few(density: float, *shape: int, values: int = 16) -> Tensor:
    """Random weights that take few values, all of them exact in fp16."""
    book = torch.randn(values).half().float()
    return torch.where(torch.rand(shape) < density, book[torch.randint(values, shape)], 0.0)


def reader(data: bytes) -> Reader:
    return Reader(np.frombuffer(data, np.uint8), "damaged")


def test_numbers_by_hand() -> None:
    # 300 is 2 x 128 + 44
    assert shared.number(5) == b"\x05"
    assert shared.number(300) == bytes([44 | 128, 2])
    assert reader(bytes([44 | 128, 2])).number() == 300


def test_gamma_codes_by_hand() -> None:
    # 1, 010, 011: bits 0, 2, 5 and 6
    assert shared.gamma(np.array([1, 2, 3])) == bytes([0b1100101])
    # frequencies 0, 1, 2, and one more to make 4
    table = shared.gamma(np.array([0, 1, 2, 1]) + 1)
    assert unpack.frequencies(reader(table), 4, 2).tolist() == [0, 1, 2, 1]


def test_tokens_by_hand() -> None:
    # m = 1: 0 to 3 are their own tokens; 4, 5 are 10x, token 4; 6, 7 are 11x, token 5; 8 to 11 are 10xx, token 6
    token, low = shared.tokens(np.array([0, 3, 4, 5, 6, 7, 8, 11, 12]), 1)
    assert token.tolist() == [0, 3, 4, 4, 5, 5, 6, 6, 7]
    assert low.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    # m = 0: 2, 3 are 1x, token 2
    token, low = shared.tokens(np.array([0, 1, 2, 3, 4, 7]), 0)
    assert token.tolist() == [0, 1, 2, 2, 3, 3]
    assert low.tolist() == [0, 0, 1, 1, 2, 2]


def test_a_code_by_hand() -> None:
    """Frequencies 3 and 1 of 4; each symbol x -> (x // f) * 4 + x % f + start, from the last one on."""
    state = 2**16
    for symbol in reversed([0, 0, 1]):
        often, start = ((3, 0), (1, 3))[symbol]
        state = (state // often) * 4 + state % often + start
    made = shared.rans(np.array([0, 0, 1]), np.array([3, 1]), 2)
    assert made == b"\x00" + state.to_bytes(4, "little")
    assert unpack.rans(reader(made), 3, np.array([3, 1]), 2).tolist() == [0, 0, 1]


def test_a_payload_by_hand(tmp_path: Path) -> None:
    """One column of a matrix is kept, all of one value: nothing but the outline is stored."""
    tensor = torch.zeros(40, 50)
    tensor[:, 7] = 1.5
    size = packed.write(tmp_path / "a", {"w": tensor}, shared_values=True).tensors["w"]
    all_rows, one_column = b"\xff" * 5, b"\x80" + bytes(6)
    # m = 0, scale 0, one token, whose frequency 1 is gamma 010
    same = b"\x00\x00\x01\x02"
    index = bytes([1]) + all_rows + one_column + same
    payload = bytes([len(index)]) + index + b"\x01" + np.float16(1.5).tobytes() + same
    assert (size.coding, size.width, size.kept, size.index_bytes) == ("shared", 1, 40, len(index))
    assert size.total_bytes == len(payload)
    whole = (tmp_path / "a").read_bytes()
    header = b"\x01w" + bytes([0, 4, 1, 2, 40, 50, 40, len(payload)]) + hashlib.sha256(payload).digest()[:8]
    start = unpack.PRELUDE.pack(b"SECPACK\n", 3, len(header), len(payload), hashlib.sha256(header).digest())
    assert whole == start + payload + header
    assert torch.equal(packed.read(tmp_path / "a")["w"], tensor)


@pytest.mark.parametrize("scale", [5, 8, 12])
def test_frequencies_sum_to_their_scale_and_leave_none_out(scale: int) -> None:
    counts = np.array([0, 1, 1, 5000, 3, 0, 70])
    often = shared.scaled(counts, scale)
    assert often.sum() == 2**scale
    assert ((often > 0) == (counts > 0)).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**36) | st.integers(0, 9), max_size=300))
def test_any_numbers_survive_a_stream(numbers: list[int]) -> None:
    part = reader(shared.stream(np.array(numbers, np.int64)))
    assert unpack.stream(part, len(numbers)).tolist() == numbers
    assert part.left == 0


def test_numbers_of_many_lanes_survive_a_stream() -> None:
    numbers = np.random.default_rng(0).geometric(0.05, 100_001).astype(np.int64) - 1
    made = shared.stream(numbers)
    assert np.array_equal(unpack.stream(reader(made), len(numbers)), numbers)
    assert len(made) <= 1.01 * shared.entropy(np.bincount(numbers)) / 8


@anywhere
@given(st.data())
def test_round_trip_of_any_few_values(tmp_path: Path, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 12), max_size=4)))
    kind = data.draw(st.sampled_from([np.uint32, np.uint16, np.uint8, np.uint64]))
    book = data.draw(st.lists(st.integers(0, 2 ** (8 * kind().itemsize) - 1), min_size=1, max_size=5))
    count = math.prod(shape)
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    elements = chance.choice(np.array([0, *book], kind), count)
    names = {4: torch.float32, 2: torch.bfloat16, 1: torch.uint8, 8: torch.float64}
    tensor = torch.from_numpy(elements).view(names[kind().itemsize]).reshape(shape)
    packed.write(tmp_path / "a", {"w": tensor, "again": tensor}, shared_values=True)
    for found in packed.read(tmp_path / "a").values():
        assert found.shape == tensor.shape
        if count:  # torch cannot view nothing
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_small_files_are_within_a_tenth_of_the_entropy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for density in (0.01, 0.05, 0.2, 0.5):
        size = packed.write(tmp_path / "a", {"w": few(density, 300, 784)}, shared_values=True).tensors["w"]
        assert size.bound is not None
        assert size.total_bytes <= 1.10 * size.bound / 8 + 64


def test_dead_rows_and_columns_cost_next_to_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensor = few(0.1, 300, 784)
    tensor[torch.rand(300) < 0.7] = 0
    tensor[:, torch.rand(784) < 0.5] = 0
    size = packed.write(tmp_path / "a", {"w": tensor}, shared_values=True).tensors["w"]
    assert size.bound is not None
    assert size.total_bytes < 0.85 * size.bound / 8


def test_a_codebook_is_stored_in_the_shortest_exact_form(tmp_path: Path) -> None:
    half, brain, single = 0.1, 1e30, 0.1
    tensors = {
        "half": torch.tensor([np.float16(half)] * 100).float(),
        "brain": torch.full((100,), brain).bfloat16().float(),
        "single": torch.full((100,), single),
    }
    sizes = packed.write(tmp_path / "a", tensors, shared_values=True).tensors
    assert [size.width for size in sizes.values()] == [1, 2, 0]
    for name, found in packed.read(tmp_path / "a").items():
        assert torch.equal(found, tensors[name])


def test_what_shares_no_values_is_stored_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"w": torch.randn(50, 40), "n": torch.tensor(3), "none": torch.zeros(30), "empty": torch.zeros(0, 4)}
    sizes = packed.write(tmp_path / "a", tensors, shared_values=True).tensors
    assert [size.coding for size in sizes.values()] == ["dense", "dense", "relative", "dense"]
    assert all(torch.equal(found, tensors[name]) for name, found in packed.read(tmp_path / "a").items())


def test_ten_million_values_are_read_in_seconds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensor = few(0.08, 2048, 8192)
    packed.write(tmp_path / "a", {"w": tensor}, shared_values=True)
    started = time.process_time()
    assert torch.equal(packed.read(tmp_path / "a")["w"], tensor)
    assert time.process_time() - started < 10


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {"w": few(0.04, 50, 80), "v": few(0.5, 64, 9, values=3), "b": torch.randn(5)}
    packed.write(tmp_path / "model.packed", tensors, shared_values=True)
    return tmp_path / "model.packed"


@anywhere
@given(st.data())
def test_an_altered_cut_or_padded_file_is_refused(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    other = file.with_name("other")
    for content in (bytes(changed), whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"x"):
        other.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            packed.read(other)


def entries_of(data: bytes) -> tuple[list[PackedTensor], bytes]:
    length, payload = unpack.PRELUDE.unpack(data[: unpack.PRELUDE.size])[2:4]
    middle = unpack.PRELUDE.size + payload
    return unpack.parse_short(data[middle : middle + length]), data[unpack.PRELUDE.size : middle]


def assembled(entries: list[PackedTensor], payload: bytes) -> bytes:
    """A file whose hashes fit: what a careful attacker would send."""
    header, offset = b"", 0
    for entry in entries:
        digest = hashlib.sha256(payload[offset : offset + entry.length]).digest()
        header += packed._pack_short(replace(entry, digest=digest))
        offset += entry.length
    start = (unpack.MAGIC, unpack.SHARED_VERSION, len(header), len(payload), hashlib.sha256(header).digest())
    return unpack.PRELUDE.pack(*start) + payload + header


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"shape": (2**40,)}, "too large"),
        ({"shape": (0, 2**36, 2**36)}, "too large"),
        ({"shape": (2**36, 0)}, "contradict"),
        ({"shape": (3,)}, "contradict"),
        ({"shape": (50, 79)}, "damaged|out of bounds"),
        ({"shape": ()}, "contradict"),
        ({"shape": (), "entries": 1}, "damaged"),
        ({"entries": 10**9}, "contradict"),
        ({"entries": 0}, "damaged|out of bounds"),
        ({"entries": 100}, "damaged|out of bounds"),
        ({"width": 3}, "contradict"),
        ({"width": 0}, "damaged"),
        ({"dtype": "complex128"}, "contradict"),
        ({"dtype": "float64", "width": 0}, "damaged"),
        ({"length": 2**40}, "do not fill"),
        ({"name": "v"}, "one name"),
    ],
)
def test_a_lying_header_is_refused(file: Path, change: dict[str, Any], problem: str) -> None:
    entries, payload = entries_of(file.read_bytes())
    assert entries[0].coding == "shared"
    file.write_bytes(assembled([replace(entries[0], **change), *entries[1:]], payload))
    with pytest.raises(UserError, match=f"cannot be read: .*({problem})"):
        packed.read(file)


def test_a_small_file_of_many_entries_takes_no_memory(tmp_path: Path) -> None:
    """All entries of one value need no bytes of their own, so their number is bounded by those that there are."""
    many = PackedTensor("w", (2**28,), "float32", "shared", 1, 2**28, 12, b"")
    (tmp_path / "a").write_bytes(assembled([many], bytes(12)))
    with pytest.raises(UserError, match="contradict"):
        packed.read(tmp_path / "a")


def test_mutated_payloads_give_an_error_or_tensors(file: Path) -> None:
    entries, payload = entries_of(file.read_bytes())
    chance, outcomes = random.Random(0), []
    for _ in range(600):
        changed = bytearray(payload)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(entries[0].length + entries[1].length)] = chance.choice((0, 1, 127, 128, 255))
        file.write_bytes(assembled(entries, bytes(changed)))
        try:
            packed.read(file)
            outcomes.append("read")
        except UserError as error:
            outcomes.append(str(error))
    for words in ("read", "damaged", "out of bounds"):
        assert any(words in text for text in outcomes), words
