"""The layout of the files that Han et al. released (Deep Compression), read and written byte for byte.

Little-endian, no magic number, the layers in prototxt order (those with "conv", "fc" or "ip" in the name):

    uint32 num_nz[layers]        entries of each layer, fillers counted
    then for each layer:
    float32 codebook[2^b]        b = 8 where the name contains "conv", else 4; codebook[0] is 0
    float32 bias[out]
    codes                        a byte each where b = 8, else two a byte, the low nibble first
    gaps                         two a byte, the low nibble first: zeros skipped, 0 to 15

Positions are over the weight flattened in C order. A gap of more than 15 is bridged by fillers, code 0 with gap 15.
Trailing zeros are not stored, and an odd count's pad nibble is 0. (Layout: PAPER, storage; the authors' decode.py.)

In memory a layer `fc1` is five arrays: `fc1.weight` (float32, its shape) and `fc1.bias`, and what the file says of the
weight, which is more than its values: `fc1.codebook` (float32), `fc1.codes` and `fc1.gaps` (uint8, one an entry).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import few
from pipeline.export import coding

KINDS = ("conv", "fc", "ip")
GAP_BITS = 4
MAX_WEIGHTS = 2**31  # of a layer

Bytes = NDArray[np.uint8]


class ReleasedLayer(BaseModel):
    """A layer whose weights are stored: its name in the prototxt and its weight's shape, (out, in[, h, w])."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2, max_length=4)]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if "conv" in self.name else 4

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


class Stored(NamedTuple):
    """A layer's weight as its file has it: the codebook, and a code and a gap for each entry."""

    codebook: NDArray[np.float32]
    codes: Bytes
    gaps: Bytes


def load_layers(path: str | Path) -> list[ReleasedLayer]:
    """A YAML list of {name, shape}, in prototxt order. Raises UserError where it is not one."""
    if not storage.exists(path):
        raise UserError(
            f"list of layers '{path}' does not exist: write a YAML list of {{name: fc1, shape: [300, 784]}}"
        )
    try:
        layers = TypeAdapter(list[ReleasedLayer]).validate_python(yaml.safe_load(storage.read_bytes(path)))
    except yaml.YAMLError as error:
        raise UserError(f"list of layers '{path}' is no YAML: {error}") from None
    except ValidationError as error:
        places = few(".".join(map(str, problem["loc"])) or "the top" for problem in error.errors())
        raise UserError(
            f"list of layers '{path}' is wrong at {places}: write a list of {{name: fc1, shape: [300, 784]}}"
        ) from None
    names = [layer.name for layer in layers]
    for layer in layers:
        if not any(kind in layer.name for kind in KINDS):
            raise UserError(f"'{path}': layer '{layer.name}' is in no released file (conv, fc, ip are): leave it out")
        if names.count(layer.name) > 1 or layer.weights > MAX_WEIGHTS:
            raise UserError(f"'{path}': layer '{layer.name}' stands twice or has over {MAX_WEIGHTS:,} weights: mend it")
    return layers


def read_released(path: str | Path, layers: Sequence[ReleasedLayer]) -> dict[str, NDArray[Any]]:
    """The arrays of a released file, as the module's head names them.

    Raises UserError where the file and the layers do not fit each other. All lengths are checked before anything is
    read, and an unpacked weight's size is the one that `layers` states.
    """
    if not storage.exists(path):
        raise UserError(f"released file '{path}' does not exist: check its name")
    size, front = storage.size(path), 4 * len(layers)
    if size < front:
        _fail(path, f"{size:,} bytes are too few for the counts of {len(layers)} layers")
    data = np.zeros(0, np.uint8)
    with storage.open_range(path) as file:
        counts = np.frombuffer(file.read(front), "<u4").tolist()
        for layer, count in zip(layers, counts, strict=True):
            if count > layer.weights:
                _fail(path, f"layer '{layer.name}' would have {count:,} entries for {layer.weights:,} weights")
        expected = front + sum(_length(layer, count) for layer, count in zip(layers, counts, strict=True))
        if size != expected:
            _fail(path, f"it was {'cut' if size < expected else 'padded'}: {size:,} bytes in place of {expected:,}")
        data = np.frombuffer(file.read(), np.uint8)
    tensors: dict[str, NDArray[Any]] = {}
    for layer, count in zip(layers, counts, strict=True):
        length = _length(layer, count)
        stored, bias = _split(path, layer, count, data[:length])
        tensors[f"{layer.name}.weight"] = _weight(layer, stored)
        tensors[f"{layer.name}.bias"] = bias
        tensors |= {f"{layer.name}.{part}": array for part, array in stored._asdict().items()}
        data = data[length:]
    return tensors


def write_released(path: str | Path, layers: Sequence[ReleasedLayer], tensors: Mapping[str, NDArray[Any]]) -> int:
    """Write a released file; returns its bytes. For each layer, besides its bias, the first of these that is there:

    1. codebook, codes and gaps: written as they are, so that what `read_released` gave comes out byte for byte. A
       weight beside them must be the one that they stand for.
    2. codebook, and codes in the weight's shape, 0 where it is pruned.
    3. weight: its values are at most 2^b - 1 besides 0; the codebook is 0 and the values in rising order.

    Raises UserError for a layer where none is there, or one is not as it should be.
    """
    counts, parts = [], []
    for layer in layers:
        stored = _stored(layer, tensors)
        counts.append(len(stored.codes))
        codes = stored.codes if layer.bits == 8 else _pack_nibbles(stored.codes)
        bias = _floats(layer, tensors, "bias", layer.shape[0])
        parts += [stored.codebook.tobytes(), bias.tobytes(), codes.tobytes(), _pack_nibbles(stored.gaps).tobytes()]
    content = b"".join([np.array(counts, "<u4").tobytes(), *parts])
    storage.write_bytes(path, content)
    return len(content)


def _fail(path: str | Path, problem: str) -> NoReturn:
    raise UserError(
        f"released file '{path}' cannot be read: {problem}; check that the layers are those of its network, in "
        "prototxt order, or fetch it again"
    )


def _length(layer: ReleasedLayer, count: int) -> int:
    """Bytes that a layer of so many entries takes."""
    pairs = (count + 1) // 2
    return 4 * 2**layer.bits + 4 * layer.shape[0] + (count if layer.bits == 8 else pairs) + pairs


def _split(path: str | Path, layer: ReleasedLayer, count: int, data: Bytes) -> tuple[Stored, NDArray[np.float32]]:
    """A layer's parts, as copies."""
    ends = np.cumsum([4 * 2**layer.bits, 4 * layer.shape[0], count if layer.bits == 8 else (count + 1) // 2])
    codebook, bias, codes, gaps = np.split(data, ends)
    if layer.bits == 4:
        codes = _unpack_nibbles(path, layer, codes, count)
    stored = Stored(_as_floats(codebook), codes.copy(), _unpack_nibbles(path, layer, gaps, count))
    if stored.codebook[0] != 0:
        _fail(path, f"codebook[0] of layer '{layer.name}' is {stored.codebook[0]}, not 0")
    if _reach(stored) > layer.weights:
        _fail(path, f"gaps of layer '{layer.name}' lead over {_reach(stored):,} weights of {layer.weights:,}")
    return stored, _as_floats(bias)


def _as_floats(data: Bytes) -> NDArray[np.float32]:
    return np.frombuffer(data.tobytes(), "<f4").copy()


def _reach(stored: Stored) -> int:
    """How many weights the entries span."""
    return len(stored.gaps) + int(stored.gaps.sum(dtype=np.int64))


def _weight(layer: ReleasedLayer, stored: Stored) -> NDArray[np.float32]:
    """The weight that codes and gaps stand for."""
    places = np.cumsum(stored.gaps.astype(np.int64) + 1) - 1
    weight = np.zeros(layer.weights, np.float32)
    weight[places] = stored.codebook[stored.codes]
    return weight.reshape(layer.shape)


def _stored(layer: ReleasedLayer, tensors: Mapping[str, NDArray[Any]]) -> Stored:
    """A layer's weight in the form that is written, from whichever form it has."""
    name = layer.name
    if f"{name}.codes" not in tensors:
        return _from_values(layer, _floats(layer, tensors, "weight", layer.weights))
    codebook = _floats(layer, tensors, "codebook", 2**layer.bits)
    if codebook[0] != 0:
        raise UserError(
            f"tensor '{name}.codebook' begins with {codebook[0]}: its first value stands for pruned, set it 0"
        )
    if f"{name}.gaps" not in tensors:
        return _from_codes(codebook, _small(layer, tensors, "codes", layer.weights, layer.bits))
    codes, gaps = (
        _small(layer, tensors, part, None, bits) for part, bits in (("codes", layer.bits), ("gaps", GAP_BITS))
    )
    if len(codes) != len(gaps):
        raise UserError(
            f"'{name}.codes' has {len(codes):,} entries and '{name}.gaps' {len(gaps):,}: give as many of both"
        )
    stored = Stored(codebook, codes, gaps)
    if _reach(stored) > layer.weights:
        raise UserError(
            f"tensor '{name}.gaps' leads over {_reach(stored):,} weights of {layer.weights:,}: check the layer's shape"
        )
    weight = _weight(layer, stored)
    given = tensors.get(f"{name}.weight", weight)
    if given.shape != weight.shape or not np.array_equal(given, weight, equal_nan=True):
        raise UserError(f"tensor '{name}.weight' is not what '{name}.codes' stand for: leave out the one that is old")
    return stored


def _from_values(layer: ReleasedLayer, weight: NDArray[np.float32]) -> Stored:
    """Quantised weights, their codebook in rising order after 0."""
    values = np.unique(weight[weight != 0])
    most = 2**layer.bits - 1
    if len(values) > most or not np.isfinite(values).all():
        raise UserError(
            f"layer '{layer.name}' has {len(values):,} different non-zero values, and {most} finite ones can be "
            "stored: quantise it first"
        )
    codebook = np.zeros(2**layer.bits, "<f4")
    codebook[1 : len(values) + 1] = values
    codes = np.where(weight != 0, np.searchsorted(values, weight) + 1, 0)
    return _from_codes(codebook, codes.astype(np.uint8))


def _from_codes(codebook: NDArray[np.float32], codes: Bytes) -> Stored:
    """One code a weight, 0 where it is pruned; the fillers are put in."""
    gaps, kept = coding.survivors(codes)
    entries = len(kept) + int((gaps >> GAP_BITS).sum())
    all_gaps, all_codes = coding.bridge(gaps, kept, entries, GAP_BITS)
    return Stored(codebook, all_codes.astype(np.uint8), all_gaps.astype(np.uint8))


def _floats(layer: ReleasedLayer, tensors: Mapping[str, NDArray[Any]], part: str, length: int) -> NDArray[np.float32]:
    """A float32 tensor of the given number of elements, flat."""
    return _part(layer, tensors, part, length, "float32").astype("<f4", copy=False)


def _small(
    layer: ReleasedLayer, tensors: Mapping[str, NDArray[Any]], part: str, length: int | None, bits: int
) -> Bytes:
    """A uint8 tensor whose values fit into `bits` bits, flat."""
    found = _part(layer, tensors, part, length, "uint8")
    if len(found) and found.max() >= 2**bits:
        raise UserError(f"tensor '{layer.name}.{part}' holds {found.max()}: {bits} bits hold at most {2**bits - 1}")
    return found


def _part(
    layer: ReleasedLayer, tensors: Mapping[str, NDArray[Any]], part: str, length: int | None, dtype: str
) -> NDArray[Any]:
    name = f"{layer.name}.{part}"
    if name not in tensors:
        raise UserError(f"tensor '{name}' is missing: the layer needs its bias, and codebook and codes or a weight")
    found = tensors[name]
    if found.dtype != dtype or length not in (None, found.size):
        wanted = dtype if length is None else f"{dtype} of {length:,} elements"
        raise UserError(f"tensor '{name}' is {found.dtype} of {found.size:,} elements: it must be {wanted}")
    return found.reshape(-1)


def _pack_nibbles(numbers: Bytes) -> Bytes:
    """Two numbers a byte, the first in the low half; an odd count ends with a nibble 0."""
    even = np.append(numbers, np.zeros(len(numbers) % 2, np.uint8))
    return np.asarray(even[::2] | even[1::2] << 4, np.uint8)


def _unpack_nibbles(path: str | Path, layer: ReleasedLayer, data: Bytes, count: int) -> Bytes:
    """The numbers that `_pack_nibbles` packed."""
    numbers = np.stack([data & 15, data >> 4], axis=1).reshape(-1)
    if numbers[count:].any():
        _fail(path, f"the nibble after the last one of layer '{layer.name}' is not 0")
    return numbers[:count]
