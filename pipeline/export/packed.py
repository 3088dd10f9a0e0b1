"""Packed files: a network's tensors, each in its smallest coding, exact to the bit.

`unpack.py` describes the format and reads it, with nothing but numpy; this module writes it, and reads it as torch
tensors. Reading and writing go tensor by tensor, and hold no second copy of the whole network.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.export import coding, shared, unpack
from pipeline.export.shared import number
from pipeline.export.unpack import (
    CODINGS,
    DTYPES,
    ENTRY,
    MAGIC,
    PRELUDE,
    SHARED_VERSION,
    UNSIGNED,
    VERSION,
    PackedTensor,
)

Values = Literal["fp32", "fp16", "bf16"]
VALUES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TensorSize:
    """How one tensor is stored. `kept` elements are not zero; `index_bytes` are gaps or mask, and fillers' values.

    `bound`, of shared values: the bits that the entropy of order zero asks for, see `shared.Shared`.
    """

    coding: str
    width: int
    kept: int
    fillers: int
    index_bytes: int
    total_bytes: int
    bound: float | None = None


@dataclass(frozen=True)
class PackedSizes:
    """Bytes of a packed file: all of it, its header, all indices; and each tensor's.

    bits_per_kept and index_bits_per_kept: bits a non-zero element takes, in all and for its index alone (the paper's 5
    or 8, fillers counted); 0 where a tensor is all zeros.
    """

    total: int
    header: int
    index: int
    tensors: dict[str, TensorSize]

    @property
    def bits_per_kept(self) -> dict[str, float]:
        return {name: 8 * size.total_bytes / size.kept if size.kept else 0.0 for name, size in self.tensors.items()}

    @property
    def index_bits_per_kept(self) -> dict[str, float]:
        return {name: 8 * size.index_bytes / size.kept if size.kept else 0.0 for name, size in self.tensors.items()}

    @property
    def bound(self) -> int | None:
        """Bytes of the file if tensors with shared values took their entropy; None where there are none."""
        left = [(size.total_bytes, size.bound) for size in self.tensors.values() if size.bound is not None]
        if not left:
            return None
        return self.total - sum(taken for taken, _ in left) + math.ceil(sum(bound for _, bound in left) / 8)

    @property
    def bound_per_kept(self) -> dict[str, float]:
        """The entropy of order zero, in bits for each non-zero element, of the tensors with shared values."""
        found = {name: size.bound for name, size in self.tensors.items()}
        return {name: bound / self.tensors[name].kept for name, bound in found.items() if bound is not None}


def write(
    path: str | Path, tensors: Mapping[str, Tensor], values: Values | None = None, check: storage.Check | None = None,
    *, shared_values: bool = False,
) -> PackedSizes:  # fmt: skip
    """Write the tensors to a packed file, whole or not at all; returns its sizes. `check` is called before each try.

    `values` stores every floating-point tensor in that dtype, rounded to the nearest; reading gives that dtype back. By
    default each tensor keeps its own dtype and is exact. A value too small for fp16 becomes 0, and is then not counted
    as kept. `shared_values` tries codebooks for all tensors, as exactly; the file is then of version 3.

    Raises UserError for a tensor that is not plain and strided with one of DTYPES, for a value too large for `values`,
    and for tensors so sparse that the file would unpack to more than a reader allows.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    # By a local file, since the header at its front is written last.
    with storage.atomic_path(path, check) as local, local.open("wb") as file:
        stored = None if values is None else VALUES[values]
        sizes, unpacked = (_write_shared if shared_values else _write)(file, tensors, stored)
        if unpacked > max(unpack.FREE_BYTES, unpack.EXPANSION * sizes.total):
            raise UserError(
                f"'{path}' would unpack from {sizes.total:,} bytes to {unpacked:,}, more than a reader allows: "
                "nearly all of it is zero; leave tensors of zeros out"
            )
    return sizes


def read(path: str | Path, most: int | None = None) -> dict[str, Tensor]:
    """The tensors of a packed file, in order and to the bit. Takes and raises what `iterate` does."""
    return dict(iterate(path, most))


def iterate(path: str | Path, most: int | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed file, one at a time. `most` is the bytes that it may unpack to, by default `unpack`'s
    limit.

    Raises UserError where the file is missing, cut, padded, altered, of another version, or not a packed file. Every
    length is checked before memory is taken for it, every tensor before it is decoded.
    """
    if not storage.exists(path):
        raise UserError(f"packed file '{path}' does not exist: check its name")
    try:
        with storage.local_copy(path) as file:
            for entry, raw in unpack.iterate(file, most):
                yield entry.name, unpack.to_torch(entry, raw)
                del raw  # so that the next one is not read beside it
    except OSError as error:
        raise UserError(f"packed file '{path}' cannot be opened: {error.strerror}; check its permissions") from error
    except unpack.Damaged as error:
        raise UserError(f"packed file '{path}' cannot be read: {error}") from error


def _check(name: str, tensor: Tensor) -> None:
    plain = tensor.layout == torch.strided and not tensor.is_meta and _dtype(tensor) in DTYPES
    if not plain or len(name.encode()) >= 2**16:
        raise UserError(f"tensor '{name}' ({tensor.dtype}, {tensor.layout}, {tensor.device}) cannot be packed")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], stored: torch.dtype | None) -> tuple[PackedSizes, int]:
    """Write header and payload; returns the sizes and the bytes that the file unpacks to.

    The header's length follows from names and shapes: room is left for it, and it is written when the payload is known.
    """
    front = PRELUDE.size + sum(ENTRY.size + len(n.encode()) + 8 * t.dim() for n, t in tensors.items())
    file.write(bytes(front))
    header = b""
    unpacked = 0
    sizes: dict[str, TensorSize] = {}
    for name, tensor in tensors.items():
        entry, sizes[name] = _write_tensor(file, name, tensor, stored)
        header += _pack_entry(entry)
        unpacked += entry.numel * entry.item
    payload = file.tell() - front
    file.seek(0)
    file.write(PRELUDE.pack(MAGIC, VERSION, len(header), payload, hashlib.sha256(header).digest()) + header)
    index = sum(size.index_bytes for size in sizes.values())
    return PackedSizes(front + payload, front, index, sizes), unpacked


def _write_shared(file: BinaryIO, tensors: Mapping[str, Tensor], stored: torch.dtype | None) -> tuple[PackedSizes, int]:
    """The same in version 3, whose header comes last, since its length follows from the payload."""
    file.write(bytes(PRELUDE.size))
    entries: list[PackedTensor] = []
    sizes: dict[str, TensorSize] = {}
    for name, tensor in tensors.items():
        entry, sizes[name] = _write_tensor(file, name, tensor, stored, shared_values=True)
        entries.append(entry)
    payload = file.tell() - PRELUDE.size
    header = b"".join(_pack_short(entry) for entry in entries)
    file.write(header)
    file.seek(0)
    file.write(PRELUDE.pack(MAGIC, SHARED_VERSION, len(header), payload, hashlib.sha256(header).digest()))
    front, index = PRELUDE.size + len(header), sum(size.index_bytes for size in sizes.values())
    return PackedSizes(front + payload, front, index, sizes), sum(entry.numel * entry.item for entry in entries)


def _write_tensor(
    file: BinaryIO, name: str, tensor: Tensor, stored: torch.dtype | None, shared_values: bool = False
) -> tuple[PackedTensor, TensorSize]:
    plain = _stored_as(name, tensor.detach(), stored).resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    item, numel = plain.element_size(), plain.numel()
    raw = plain.view(torch.uint8).numpy() if numel else np.zeros(0, np.uint8)  # torch cannot view nothing
    codebook = None
    if item in UNSIGNED:
        elements = raw.view(UNSIGNED[item])
        gaps, values = coding.survivors(elements)
        choice, kept = coding.choose(gaps, numel, item), len(values)
        parts = coding.encode(choice, elements, gaps, values)
        codebook = shared.encode(elements, tuple(tensor.shape), _dtype(plain)) if shared_values else None
    else:
        choice, kept = coding.Choice("dense", 0, numel, len(raw)), int(raw.reshape(-1, item).any(axis=1).sum())
        parts = iter([raw])
    bound, index = None, 0 if choice.coding == "dense" else choice.total_bytes - kept * item
    if codebook is not None and len(codebook.payload) < choice.total_bytes:
        choice = coding.Choice("shared", codebook.form, kept, len(codebook.payload))
        parts = iter([np.frombuffer(codebook.payload, np.uint8)])
        bound, index = codebook.bound, codebook.index_bytes
    digest = hashlib.sha256()
    for part in parts:
        data = part.view(np.uint8).data
        digest.update(data)
        file.write(data)
    length, entries = choice.total_bytes, choice.entries
    fillers = entries - kept if choice.coding == "relative" else 0
    entry = PackedTensor(
        name, tuple(tensor.shape), _dtype(plain), choice.coding, choice.width, entries, length, digest.digest()
    )
    return entry, TensorSize(choice.coding, choice.width, kept, fillers, index, length, bound)


def _stored_as(name: str, tensor: Tensor, stored: torch.dtype | None) -> Tensor:
    """A floating-point tensor in the dtype that values are stored in. Raises UserError where one becomes infinite."""
    if stored is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(stored)
    if torch.finfo(stored).max < torch.finfo(tensor.dtype).max and bool((cast.isinf() & tensor.isfinite()).any()):
        raise UserError(f"tensor '{name}' holds values too large for {stored}: store them as fp32 or bf16")
    return cast


def _pack_entry(entry: PackedTensor) -> bytes:
    name = entry.name.encode()
    dtype, kind = list(DTYPES).index(entry.dtype), CODINGS.index(entry.coding)
    fixed = ENTRY.pack(len(name), dtype, kind, entry.width, len(entry.shape), entry.entries, entry.length, entry.digest)
    return fixed + name + np.array(entry.shape, "<u8").tobytes()


def _pack_short(entry: PackedTensor) -> bytes:
    """An entry of the header of version 3."""
    name = entry.name.encode()
    kinds = bytes([list(DTYPES).index(entry.dtype), CODINGS.index(entry.coding), entry.width])
    sizes = b"".join(map(number, (len(entry.shape), *entry.shape, entry.entries, entry.length)))
    return number(len(name)) + name + kinds + sizes + entry.digest[:8]
