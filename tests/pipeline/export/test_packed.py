import hashlib
import math
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
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
from pipeline.export import packed, unpack
from pipeline.export.unpack import PackedTensor

anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw(found[name]) == raw(tensor)


def pruned(density: float, *shape: int) -> Tensor:
    """Random weights, the pruned ones +0.0 (a product with a mask would leave -0.0, which is kept to the bit)."""
    return torch.where(torch.rand(shape) < density, torch.randn(shape), 0.0)


def sparse(numel: int, kept: dict[int, float]) -> Tensor:
    tensor = torch.zeros(numel)
    for place, value in kept.items():
        tensor[place] = value
    return tensor


def test_a_whole_file_by_hand(tmp_path: Path) -> None:
    # Zeros skipped 5, 0, 20. Rice at width 1: quotients 2, 0, 10 in unary 001 1 00000000001, low bits 1, 0, 0; 3 bytes.
    # Relative at width 5 takes 5, at width 4 a filler and 4 + 4; the bitmask takes 8.
    tensor = sparse(64, {5: 1.0, 6: -2.0, 27: 3.0})
    sizes = packed.write(tmp_path / "a", {"w": tensor})
    payload = bytes([0b00001100, 0b01000000, 0b001]) + np.array([1, -2, 3], dtype="<f4").tobytes()
    header = (
        struct.pack("<HBBBBQQ", 1, 0, 3, 1, 1, 3, 15) + hashlib.sha256(payload).digest() + b"w" + b"\x40" + bytes(7)
    )
    start = b"SECPACK\n" + struct.pack("<IIQ", 2, 63, 15) + hashlib.sha256(header).digest()
    assert (tmp_path / "a").read_bytes() == start + header + payload
    assert sizes.tensors["w"] == packed.TensorSize("rice", 1, 3, 0, 3, 15)
    assert (sizes.total, sizes.header, sizes.index) == (56 + 63 + 15, 56 + 63, 3)
    assert sizes.bits_per_kept["w"] == 40.0
    assert sizes.index_bits_per_kept["w"] == 8.0
    assert_same(packed.read(tmp_path / "a"), {"w": tensor})


def test_relative_coding_by_hand(tmp_path: Path) -> None:
    # Zeros skipped: 0, 1, 2, 3 twice. Two planes of a byte; Rice takes 3 bytes at width 1, the bitmask 3.
    tensor = sparse(20, dict.fromkeys([0, 2, 5, 9, 10, 12, 15, 19], 1.0))
    assert packed.write(tmp_path / "a", {"w": tensor}).tensors["w"] == packed.TensorSize("relative", 2, 8, 0, 2, 34)
    assert (tmp_path / "a").read_bytes().endswith(bytes([0b10101010, 0b11001100]) + 8 * struct.pack("<f", 1.0))
    assert_same(packed.read(tmp_path / "a"), {"w": tensor})


def test_a_filler_bridges_a_long_gap(tmp_path: Path) -> None:
    gaps = [0, 1, 2, 3] * 200 + [16]  # 4 fillers at width 2, of a byte each, are cheaper than a third plane
    places = torch.cumsum(torch.tensor(gaps) + 1, 0) - 1
    tensor = torch.zeros(3000, dtype=torch.uint8)
    tensor[places] = 7
    size = packed.write(tmp_path / "a", {"w": tensor}).tensors["w"]
    index = 2 * math.ceil(805 / 8)
    assert size == packed.TensorSize("relative", 2, 801, 4, index + 4, index + 4 + 801)
    assert_same(packed.read(tmp_path / "a"), {"w": tensor})


def test_codings_are_chosen_by_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"dense": torch.randn(4000), "half": pruned(0.6, 4000), "few": pruned(0.05, 4000)}
    sizes = packed.write(tmp_path / "a", tensors)
    assert [size.coding for size in sizes.tensors.values()] == ["dense", "bitmask", "rice"]
    assert sizes.tensors["half"].index_bytes == 500
    assert sizes.tensors["dense"].index_bytes == 0
    assert sizes.total == (tmp_path / "a").stat().st_size
    assert sizes.total == sizes.header + sum(size.total_bytes for size in sizes.tensors.values())
    assert sizes.index == sum(size.index_bytes for size in sizes.tensors.values())


@pytest.mark.parametrize("percent", [1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 35, 38, 40, 45, 50])
def test_an_index_costs_at_most_a_tenth_over_entropy(tmp_path: Path, percent: int) -> None:
    """Zero-order entropy of an i.i.d. mask, H(p)/p bits a kept weight, against all that is not values."""
    torch.manual_seed(percent)
    tensor = pruned(percent / 100, 200_000)
    kept = int(torch.count_nonzero(tensor))
    p = kept / 200_000
    entropy = -math.log2(p) - (1 - p) / p * math.log2(1 - p)
    sizes = packed.write(tmp_path / "a", {"w": tensor})
    assert 8 * (sizes.total - 4 * kept) / kept <= 1.10 * entropy
    assert sizes.index_bits_per_kept["w"] <= 1.05 * entropy


@pytest.mark.parametrize(("values", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_values_may_be_rounded(tmp_path: Path, values: Any, dtype: str) -> None:
    torch.manual_seed(0)
    tensors = {"w": pruned(0.1, 50, 40).double(), "b": torch.randn(5), "steps": torch.tensor(3)}
    size = packed.write(tmp_path / "a", tensors, values=values).tensors["w"]
    wanted = {name: t.to(getattr(torch, dtype)) if name != "steps" else t for name, t in tensors.items()}
    assert_same(packed.read(tmp_path / "a"), wanted)
    assert size.total_bytes - size.index_bytes == size.kept * wanted["w"].element_size()


def test_values_that_rounding_would_make_infinite_or_zero(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'w' holds values too large for torch.float16.*bf16"):
        packed.write(tmp_path / "a", {"w": torch.tensor([1e6, 0.0])}, values="fp16")
    assert not list(tmp_path.iterdir())
    size = packed.write(tmp_path / "a", {"w": torch.tensor([1e-9, math.inf])}, values="fp16").tensors["w"]
    assert size.kept == 1
    assert packed.read(tmp_path / "a")["w"].tolist() == [0.0, math.inf]


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(n): pruned(0.1, 1_000_000) for n in range(8)}
    tracemalloc.start()
    packed.write(tmp_path / "a", tensors)
    written = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    for name, tensor in packed.iterate(tmp_path / "a"):
        assert torch.equal(tensor, tensors[name])
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one = 4 * 1_000_000
    assert written < 2.5 * one
    assert read < 2.5 * one + one  # the tensor that the caller still holds


def test_every_dtype_and_odd_shape_survives(tmp_path: Path) -> None:
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, 1.5]
    tensors: dict[str, Tensor] = {
        "float32": torch.tensor(special),
        "float64": torch.tensor(special, dtype=torch.float64),
        "float16": torch.tensor(special, dtype=torch.float16),
        "bfloat16": torch.tensor(special, dtype=torch.bfloat16),
        "float8": torch.tensor([0.0, 1.5, -0.0]).to(torch.float8_e4m3fn),
        "int64": torch.tensor([-(2**63), 0, 2**63 - 1]),
        "uint16": torch.tensor([0, 65535], dtype=torch.uint16),
        "bool": torch.tensor([[True, False], [False, True]]),
        "complex": torch.tensor([1 + 2j, 0j]).conj(),
        "complex128": torch.tensor([1 + 2j, 0j], dtype=torch.complex128),
        "scalar": torch.tensor(7),
        "scalar0": torch.tensor(0),
        "empty": torch.empty(0),
        "empty2": torch.empty(3, 0, 2),
        "zeros": torch.zeros(10_000),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "channels_last": torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last),
        'a name.with/odd \u00fc "quotes"': torch.nn.Parameter(torch.ones(2)),
    }
    nan = torch.from_numpy(np.array([0x7FC00001, 0xFFC12345, 0x7F800001], dtype=np.uint32).view(np.float32))
    packed.write(tmp_path / "a", tensors | {"nan": nan})
    wanted = {name: tensor.detach().resolve_conj() for name, tensor in tensors.items()}
    assert_same(packed.read(tmp_path / "a"), wanted | {"nan": nan})


def test_nothing_at_all(tmp_path: Path) -> None:
    packed.write(tmp_path / "a", {})
    assert packed.read(tmp_path / "a") == {}


def test_what_was_read_can_be_trained(tmp_path: Path) -> None:
    packed.write(tmp_path / "a", {"w": torch.ones(3)})
    tensor = packed.read(tmp_path / "a")["w"]
    tensor += 1
    assert tensor.tolist() == [2.0, 2.0, 2.0]


bit_patterns = st.one_of(st.just(0), st.integers(0, 2**32 - 1))
tensors_of_bits = st.dictionaries(
    st.text(max_size=5),
    st.tuples(st.lists(bit_patterns, max_size=60), st.integers(0, 400), st.lists(bit_patterns, max_size=3)),
    max_size=3,
)


@anywhere
@given(tensors_of_bits)
def test_round_trip_of_any_bits(tmp_path: Path, content: dict[str, tuple[list[int], int, list[int]]]) -> None:
    tensors = {
        name: torch.from_numpy(np.array([*head, *[0] * gap, *tail], dtype=np.uint32).view(np.float32))
        for name, (head, gap, tail) in content.items()
    }
    packed.write(tmp_path / "a", tensors)
    assert_same(packed.read(tmp_path / "a"), tensors)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    w = pruned(0.04, 50, 8)
    packed.write(tmp_path / "model.packed", {"w": w, "m": pruned(0.6, 64), "b": torch.randn(50)})
    return tmp_path / "model.packed"


@anywhere
@given(st.data())
def test_an_altered_file_is_refused(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    other = file.with_name("altered")
    other.write_bytes(bytes(changed))
    with pytest.raises(UserError, match="cannot be read"):
        packed.read(other)


@anywhere
@given(st.data())
def test_a_cut_or_padded_file_is_refused(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    other = file.with_name("other")
    length = data.draw(st.integers(0, len(whole) - 1))
    padding = data.draw(st.binary(min_size=1, max_size=20))
    for content in (whole[:length], whole + padding):
        other.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            packed.read(other)


def parts(data: bytes) -> tuple[list[PackedTensor], bytes]:
    length = unpack.PRELUDE.unpack(data[: unpack.PRELUDE.size])[2]
    front = unpack.PRELUDE.size + length
    return unpack.parse(data[unpack.PRELUDE.size : front]), data[front:]


def assembled(header: bytes, payload: bytes) -> bytes:
    fixed = (unpack.MAGIC, unpack.VERSION, len(header), len(payload), hashlib.sha256(header).digest())
    return unpack.PRELUDE.pack(*fixed) + header + payload


def forge(path: Path, change: Callable[[list[PackedTensor]], Any], payload: bytes | None = None) -> None:
    """Rewrite a file's header, with hashes that fit: what a careful attacker would send."""
    entries, body = parts(path.read_bytes())
    body = body if payload is None else payload
    offset = 0
    for place, entry in enumerate(entries):
        digest = hashlib.sha256(body[offset : offset + entry.length]).digest()
        entries[place] = replace(entry, digest=digest)
        offset += entry.length
    change(entries)
    path.write_bytes(assembled(b"".join(packed._pack_entry(entry) for entry in entries), body))


def entry_change(place: int, **values: Any) -> Callable[[list[PackedTensor]], None]:
    def change(entries: list[PackedTensor]) -> None:
        entries[place] = replace(entries[place], **values)

    return change


def test_a_forged_header_that_changes_nothing_is_fine(file: Path) -> None:
    before = packed.read(file)
    forge(file, lambda entries: None)
    assert_same(packed.read(file), before)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (entry_change(0, shape=(2**40,)), "too large"),
        (entry_change(0, shape=(0, 2**36, 2**36)), "too large"),
        (entry_change(0, shape=(2**64 - 1,)), "too large"),
        (entry_change(0, shape=(1,) * 65), "too large"),
        (entry_change(0, shape=(3,)), "contradict"),
        (entry_change(0, coding="dense"), "contradict"),
        (entry_change(0, coding="bitmask"), "contradict"),
        (entry_change(0, coding="relative"), "contradict"),
        (entry_change(0, width=0), "contradict"),
        (entry_change(0, width=21), "contradict"),
        (entry_change(0, entries=10**9), "contradict"),
        (entry_change(0, entries=0), "contradict"),
        (entry_change(0, length=2**40), "contradict"),
        (entry_change(0, dtype="complex128"), "contradict"),
        (entry_change(0, name="b"), "one name"),
        (entry_change(1, coding="dense"), "contradict"),
        (entry_change(1, shape=(56,)), "contradict"),
        (entry_change(2, dtype="float64"), "contradict"),
        (entry_change(2, dtype="bool", shape=(200,), entries=200), "bools other than"),
        (lambda entries: entries.pop(), "do not fill"),
        (lambda entries: entries.clear(), "do not fill"),
    ],
)
def test_a_lying_header_is_refused(file: Path, change: Callable[[list[PackedTensor]], Any], problem: str) -> None:
    forge(file, change)
    with pytest.raises(UserError, match=f"cannot be read: .*{problem}"):
        packed.read(file)


@pytest.mark.parametrize(("place", "code"), [(2, 200), (3, 4), (0, 255), (54, 255)])
def test_bytes_that_mean_nothing_are_refused(file: Path, place: int, code: int) -> None:
    """In turn: dtype, coding, length of the name, the name."""
    entries, body = parts(file.read_bytes())
    header = bytearray(packed._pack_entry(entries[0]))
    header[place] = code
    file.write_bytes(assembled(bytes(header), body))
    with pytest.raises(UserError, match=r"unknown dtype or coding|ends within a tensor|not UTF-8"):
        packed.read(file)


def test_indices_that_point_elsewhere_are_refused(tmp_path: Path, file: Path) -> None:
    relative = sparse(20, dict.fromkeys([0, 2, 5, 9, 10, 12, 15, 19], 1.0))
    packed.write(tmp_path / "relative", {"w": relative})
    forge(tmp_path / "relative", entry_change(0, shape=(19,)))
    with pytest.raises(UserError, match="'w' is out of bounds"):
        packed.read(tmp_path / "relative")
    whole = file.read_bytes()
    entries, body = parts(whole)
    assert [entry.coding for entry in entries] == ["rice", "bitmask", "dense"]
    second = bytes(8) + body[entries[0].length + 8 :]
    for changed, problem in ((b"\xff" + body[1:], "quotients"), (body[: entries[0].length] + second, "mask")):
        file.write_bytes(whole)
        forge(file, lambda entries: None, changed)
        with pytest.raises(UserError, match=rf"the {problem} of tensor '[wm]'"):
            packed.read(file)


def test_a_small_file_of_a_huge_tensor_takes_no_memory(tmp_path: Path) -> None:
    huge = PackedTensor("w", (2**34,), "float32", "relative", 1, 0, 0, hashlib.sha256().digest())
    (tmp_path / "a").write_bytes(assembled(packed._pack_entry(huge), b""))
    tracemalloc.start()
    with pytest.raises(UserError, match="unpack to 68,719,476,736 bytes, more than"):
        packed.read(tmp_path / "a")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_what_no_reader_would_allow_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "FREE_BYTES", 2**20)
    with pytest.raises(UserError, match="leave tensors of zeros out"):
        packed.write(tmp_path / "a", {"w": torch.zeros(2**20)})
    assert not list(tmp_path.iterdir())
    packed.write(tmp_path / "a", {"w": torch.zeros(2**18)})
    monkeypatch.setattr(unpack, "FREE_BYTES", 2**10)
    with pytest.raises(UserError, match="most="):
        packed.read(tmp_path / "a")
    assert packed.read(tmp_path / "a", most=2**20)["w"].shape == (2**18,)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A file with some bytes changed, cut out, doubled or added, half of them with hashes that fit again."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(changed) + 1)
        stop = min(len(changed), start + chance.choice((1, 1, 2, 8, 40)))
        new = chance.choice(
            (
                b"",
                chance.randbytes(stop - start),
                b"\xff" * (stop - start),
                bytes(stop - start),
                2 * changed[start:stop],
            )
        )
        changed[start:stop] = new
    if chance.random() < 0.5:
        return bytes(changed)
    front = unpack.PRELUDE.size + unpack.PRELUDE.unpack(data[: unpack.PRELUDE.size])[2]
    header, body = changed[unpack.PRELUDE.size : front], bytes(changed[front:])
    offset = place = 0
    while place + unpack.ENTRY.size <= len(header):
        name, *_, dims, _, length, _ = unpack.ENTRY.unpack_from(header, place)
        end = place + unpack.ENTRY.size
        header[end - 32 : end] = hashlib.sha256(body[offset : offset + length]).digest()
        offset, place = offset + length, end + name + 8 * dims
    return assembled(bytes(header), body)


def outcome(path: Path) -> str:
    """How reading a file ends: "read", or the message of the only error that is allowed."""
    try:
        packed.read(path)
    except UserError as error:
        return str(error)
    return "read"


def test_mutated_files_give_an_error_or_tensors(file: Path) -> None:
    whole, chance = file.read_bytes(), random.Random(0)
    outcomes = []
    for _ in range(400):
        file.write_bytes(mutate(whole, chance))
        outcomes.append(outcome(file))
    for words in ("read", "contradict", "SHA-256", "cut", "padded"):
        assert any(words in text for text in outcomes), words


def test_each_kind_of_damage_has_its_message(file: Path) -> None:
    whole = file.read_bytes()
    version, name = struct.pack("<I", 4), unpack.PRELUDE.size + unpack.ENTRY.size
    cases = {
        "it was cut: its payload is": whole[:-1],
        r"it was cut, or the length of its header \(197 bytes\) is false": whole[:100],
        "it was cut within its first bytes": whole[:30],
        "it was padded: 2 bytes follow its end": whole + b"ab",
        r"it was cut, or the length of its header \(4,294,967,295 bytes\) is false": whole[:12]
        + b"\xff" * 4
        + whole[16:],
        "it was cut: its payload is .* bytes of 18,446,744,073,709,551,615": whole[:16] + b"\xff" * 8 + whole[24:],
        "its header was altered: its SHA-256 differs": whole[:name] + b"v" + whole[name + 1 :],
        "tensor 'b' was altered: its SHA-256 differs from the header's": whole[:-1] + bytes([whole[-1] ^ 1]),
        "its version 4 is newer than 3, the newest known; update secateur": whole[:8] + version + whole[12:],
        "its version 1 is no longer read": whole[:8] + struct.pack("<I", 1) + whole[12:],
        "it is not a packed file; give a file that": b"PK\x03\x04" + bytes(100),
    }
    for message, content in cases.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"^packed file '{file}' cannot be read: {message}"):
            packed.read(file)
    with pytest.raises(UserError, match="does not exist"):
        packed.read(file.with_name("c"))


STANDALONE = """
import importlib.util, sys
sys.modules["pipeline"] = sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("unpack", sys.argv[1])
unpack = importlib.util.module_from_spec(spec)
sys.modules["unpack"] = unpack
spec.loader.exec_module(unpack)
for name, array in unpack.load(sys.argv[2]).items():
    print(name, array.dtype, array.shape, array.tolist())
"""


def test_the_reader_needs_only_itself_and_numpy(tmp_path: Path) -> None:
    half = torch.tensor([0.0, 1.5, -0.15625])
    tensors = {"file": sparse(64, {5: 1.0, 27: 3.0}), "bf": half.bfloat16(), "e": half.to(torch.float8_e5m2)}
    packed.write(tmp_path / "a", tensors)
    reader = tmp_path / "reader.py"
    reader.write_bytes(Path(unpack.__file__).read_bytes())

    def run(*args: str) -> str:
        return subprocess.run([sys.executable, *args], check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    lines = run("-c", STANDALONE, "reader.py", "a").splitlines()
    assert lines[0] == f"file float32 (64,) {tensors['file'].tolist()}"
    assert lines[1:] == ["bf float32 (3,) [0.0, 1.5, -0.15625]", "e uint8 (3,) [0, 62, 177]"]
    assert "file  float32[64]  rice  11 bytes" in run("reader.py", "a")
    run("reader.py", "a", "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["bf"].tolist() == [0.0, 1.5, -0.15625]
        assert arrays["file"].tolist() == tensors["file"].tolist()
    assert_same(unpack.load_torch(tmp_path / "a"), tensors)
    (tmp_path / "a").write_bytes(b"nothing")
    failed = subprocess.run([sys.executable, "reader.py", "a"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("packed file 'a' cannot be read: it is not a packed file")


def test_a_tensor_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'w'.*cannot be packed"):
        packed.write(tmp_path / "a", {"w": torch.ones(3).to_sparse()})
    assert not (tmp_path / "a").exists()
