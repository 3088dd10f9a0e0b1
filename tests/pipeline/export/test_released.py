import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.export import released
from pipeline.export.released import ReleasedLayer

anywhere = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)

LAYERS = [ReleasedLayer(name="conv1", shape=(2, 1, 3, 3)), ReleasedLayer(name="fc1", shape=(2, 20))]
CONV_BOOK = np.array([0, *np.linspace(-1, 1, 255)], "<f4")
FC_BOOK = np.array([0, 0.5, -2, 4, *[9] * 12], "<f4")  # in no order, and a value twice

# conv1: weight 0 has code 200 and weight 17 code 7; 16 zeros lie between, so a filler. A byte a code.
# fc1: weights 1, 2, 30 and 31 have codes 2, 1, 3 and 2; 27 zeros lie before 30. Codes 2 1 0 3 2, gaps 1 0 15 11 0,
# two a byte, low nibble first, and a pad nibble.
BY_HAND = b"".join(
    [
        struct.pack("<II", 3, 5),
        CONV_BOOK.tobytes(),
        struct.pack("<ff", 0.25, -0.25),
        bytes([200, 0, 7]),
        bytes([0xF0, 0x00]),
        FC_BOOK.tobytes(),
        struct.pack("<ff", 1.0, 2.0),
        bytes([0x12, 0x30, 0x02]),
        bytes([0x01, 0xBF, 0x00]),
    ]
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "net.bin").write_bytes(BY_HAND)
    return tmp_path / "net.bin"


def test_a_file_by_hand_is_read(file: Path) -> None:
    tensors = released.read_released(file, LAYERS)
    assert list(tensors)[:5] == ["conv1.weight", "conv1.bias", "conv1.codebook", "conv1.codes", "conv1.gaps"]
    conv = np.zeros(18, np.float32)
    conv[[0, 17]] = CONV_BOOK[[200, 7]]
    assert tensors["conv1.weight"].tolist() == conv.reshape(2, 1, 3, 3).tolist()
    fc = np.zeros(40, np.float32)
    fc[[1, 2, 30, 31]] = [-2, 0.5, 4, -2]
    assert tensors["fc1.weight"].tolist() == fc.reshape(2, 20).tolist()
    assert tensors["fc1.bias"].tolist() == [1, 2]
    assert tensors["fc1.codes"].tolist() == [2, 1, 0, 3, 2]
    assert tensors["fc1.gaps"].tolist() == [1, 0, 15, 11, 0]
    assert {array.dtype.name for array in tensors.values()} == {"float32", "uint8"}


def test_what_was_read_is_written_byte_for_byte(file: Path, tmp_path: Path) -> None:
    size = released.write_released(tmp_path / "again", LAYERS, released.read_released(file, LAYERS))
    assert (tmp_path / "again").read_bytes() == BY_HAND
    assert size == len(BY_HAND)


def test_fillers_that_nobody_needs_are_kept(tmp_path: Path) -> None:
    """A stored zero with a short gap, and a filler after the last weight: other encoders may write them."""
    layer = [ReleasedLayer(name="ip1", shape=(1, 40))]
    entries = bytes([0x01, 0x00]) + bytes([0x33, 0x0F])  # codes 1 0 0, gaps 3 3 15
    data = struct.pack("<I", 3) + FC_BOOK.tobytes() + bytes(4) + entries
    (tmp_path / "a").write_bytes(data)
    tensors = released.read_released(tmp_path / "a", layer)
    assert np.flatnonzero(tensors["ip1.weight"]).tolist() == [3]
    released.write_released(tmp_path / "b", layer, tensors)
    assert (tmp_path / "b").read_bytes() == data


def test_codes_of_the_weights_shape(file: Path, tmp_path: Path) -> None:
    codes = np.zeros((2, 20), np.uint8)
    codes.reshape(-1)[[1, 2, 30, 31]] = [2, 1, 3, 2]
    tensors = {"fc1.codebook": FC_BOOK, "fc1.codes": codes, "fc1.bias": np.array([1, 2], "<f4")}
    conv = {k: v for k, v in released.read_released(file, LAYERS).items() if k.startswith("conv1")}
    released.write_released(tmp_path / "b", LAYERS, tensors | conv)
    assert (tmp_path / "b").read_bytes() == BY_HAND


@anywhere
@given(
    st.sampled_from(["conv_a", "fc_a"]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_quantised_weights_come_back(
    tmp_path: Path, name: str, out: int, width: int, density: float, seed: int
) -> None:
    layer = ReleasedLayer(name=name, shape=(out, width))
    chance = np.random.default_rng(seed)
    book = chance.standard_normal(2**layer.bits - 1).astype(np.float32)
    weight = np.where(chance.random((out, width)) < density, chance.choice(book, (out, width)), 0).astype(np.float32)
    tensors = {f"{name}.weight": weight, f"{name}.bias": chance.standard_normal(out).astype(np.float32)}
    released.write_released(tmp_path / "a", [layer], tensors)
    found = released.read_released(tmp_path / "a", [layer])
    assert all(found[key].tobytes() == tensors[key].tobytes() for key in tensors)
    released.write_released(tmp_path / "b", [layer], found)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BY_HAND[:-1], "it was cut: 1,122 bytes in place of 1,123"),
        (BY_HAND + b"x", "it was padded: 1,124 bytes in place of 1,123"),
        (BY_HAND[:7], "7 bytes are too few for the counts of 2 layers"),
        (b"\xff" * 8 + BY_HAND[8:], "layer 'conv1' would have 4,294,967,295 entries for 18 weights"),
        (BY_HAND[:8] + struct.pack("<f", 1) + BY_HAND[12:], r"codebook\[0\] of layer 'conv1' is 1.0, not 0"),
        (BY_HAND[:-1] + b"\xf0", "the nibble after the last one of layer 'fc1' is not 0"),
        (BY_HAND[:-3] + b"\xff\xff\x00", "gaps of layer 'fc1' lead over 65 weights of 40"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"'{file}' cannot be read: {message}; check that the layers"):
        released.read_released(file, LAYERS)


def test_mutated_files_give_an_error_or_arrays(file: Path) -> None:
    """There is no hash in these files: a changed value cannot be seen, but nothing may crash."""
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        content = bytearray(BY_HAND)
        start = chance.choice(
            (chance.randrange(8), chance.randrange(len(content)), len(content) - chance.randint(1, 6))
        )
        content[start : start + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        file.write_bytes(bytes(content))
        try:
            released.read_released(file, LAYERS)
        except UserError:
            refused += 1
    assert 100 < refused < 500


BIAS = {"fc1.bias": np.zeros(2, np.float32)}


def codes(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc1.weight": np.arange(40, dtype=np.float32)}, "39 different non-zero values, and 15 finite .* quantise"),
        ({"fc1.weight": np.full(40, np.nan, np.float32)}, "finite ones can be stored"),
        ({"fc1.weight": np.zeros(39, np.float32)}, "'fc1.weight' is float32 of 39 elements: it must be float32 of 40"),
        ({"fc1.weight": np.zeros(40)}, "'fc1.weight' is float64"),
        ({}, "'fc1.weight' is missing"),
        ({"fc1.codes": codes(1)}, "'fc1.codebook' is missing"),
        ({"fc1.codes": codes(1), "fc1.codebook": FC_BOOK}, "'fc1.codes' is uint8 of 1 elements"),
        ({"fc1.codes": codes(1), "fc1.codebook": FC_BOOK + 1}, "'fc1.codebook' begins with 1.0"),
        ({"fc1.codes": codes(1), "fc1.gaps": codes(16), "fc1.codebook": FC_BOOK}, "'fc1.gaps' holds 16: 4 bits"),
        ({"fc1.codes": codes(16), "fc1.gaps": codes(1), "fc1.codebook": FC_BOOK}, "'fc1.codes' holds 16: 4 bits"),
        ({"fc1.codes": codes(1), "fc1.gaps": codes(1, 2), "fc1.codebook": FC_BOOK}, "has 1 entries and 'fc1.gaps' 2"),
        (
            {"fc1.codes": codes(1, 1, 1), "fc1.gaps": codes(15, 15, 15), "fc1.codebook": FC_BOOK},
            "'fc1.gaps' leads over 48 weights of 40",
        ),
        (
            {
                "fc1.codes": codes(1),
                "fc1.gaps": codes(1),
                "fc1.codebook": FC_BOOK,
                "fc1.weight": np.zeros((2, 20), np.float32),
            },
            "'fc1.weight' is not what 'fc1.codes' stand for",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        released.write_released(tmp_path / "a", LAYERS[1:], tensors | BIAS)
    assert not (tmp_path / "a").exists()


def test_layers_are_a_small_yaml(tmp_path: Path) -> None:
    path = tmp_path / "layers.yaml"
    path.write_text("- {name: conv1, shape: [2, 1, 3, 3]}\n- {name: fc1, shape: [2, 20]}\n")
    assert released.load_layers(path) == LAYERS
    assert [layer.bits for layer in LAYERS] == [8, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: fc1", "is no YAML"),
        ("fc1: [3, 4]", "is wrong at the top"),
        ("- {name: fc1, shape: [3]}", "is wrong at 0.shape"),
        ("- {name: fc1, shape: [3, 0]}", "is wrong at 0.shape.1"),
        ("- {name: fc1, shape: [3, 4], bits: 4}", "is wrong at 0.bits"),
        ("- {name: relu1, shape: [3, 4]}", "layer 'relu1' is in no released file"),
        ("[{name: fc1, shape: [3, 4]}, {name: fc1, shape: [3, 4]}]", "layer 'fc1' stands twice"),
        ("- {name: fc1, shape: [100000, 100000]}", "has over 2,147,483,648 weights"),
    ],
)
def test_a_wrong_list_of_layers_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "layers.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        released.load_layers(tmp_path / "layers.yaml")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        released.load_layers(tmp_path / "layers.yaml")
    with pytest.raises(UserError, match="does not exist"):
        released.read_released(tmp_path / "net.bin", LAYERS)
