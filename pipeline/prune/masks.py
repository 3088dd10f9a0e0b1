"""Masks: bool tensors, True keeps. Made to exact counts, packed, hashed, checked and applied."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.base.errors import UserError

MOST_NESTED = 255  # masks that one byte a weight can hold


def top_mask(scores: Tensor, alive: Tensor, keep: int) -> Tensor:
    """The mask, shaped like `scores`, that keeps exactly the `keep` highest scores among `alive`.

    Of equal scores the lower flat index is kept. Scores must not be NaN; 0 <= keep <= alive.sum().
    """
    assert scores.shape == alive.shape
    assert alive.dtype == torch.bool
    living = as_bool(alive)
    count = int(np.count_nonzero(living))
    assert 0 <= keep <= count, f"keep={keep} of {count} alive"
    if keep == count:
        return alive.to(scores.device, copy=True)
    if keep == 0:
        return torch.zeros_like(alive, device=scores.device)
    values = as_array(scores)
    limit = kth_largest(values[living], keep)
    mask = (values > limit) & living
    ties = np.flatnonzero((values == limit) & living)
    mask[ties[: keep - int(np.count_nonzero(mask))]] = True
    assert int(np.count_nonzero(mask)) == keep, "scores hold NaN"
    return torch.from_numpy(mask).reshape(scores.shape).to(scores.device)


def nested(scores: Tensor, alive: Tensor, keeps: Sequence[int]) -> Tensor:
    """How many of the masks top_mask(scores, alive, keep) for `keeps` keep each weight; uint8, shaped like `scores`.

    Ties are broken by index, so the masks are nested: with falling `keeps`, mask i is `nested(...) > i`. One byte a
    weight holds up to MOST_NESTED masks. Scores must not be NaN; 1 <= keep <= alive.sum().
    """
    assert list(keeps) == sorted(keeps, reverse=True)
    assert len(keeps) <= MOST_NESTED
    living, values = as_bool(alive), as_array(scores)
    order = values[living]
    assert all(1 <= keep <= order.size for keep in keeps), f"keeps={keeps} of {order.size} alive"
    places = [order.size - keep for keep in keeps]
    if places:
        order.partition(sorted(set(places)))
    counts = np.zeros(values.size, np.uint8)
    for place, keep in zip(places, keeps, strict=True):
        mask = (values > order[place]) & living
        ties = np.flatnonzero((values == order[place]) & living)
        mask[ties[: keep - int(np.count_nonzero(mask))]] = True
        counts += mask
    return torch.from_numpy(counts).reshape(scores.shape).to(scores.device)


def kth_largest(values: NDArray[np.floating], k: int) -> float:
    """The k-th largest of the values (k from 1). Reorders `values`: hand over a copy."""
    place = values.size - k
    values.partition(place)
    return float(values[place])


def as_array(scores: Tensor) -> NDArray[np.floating]:
    """Scores as a flat NumPy array, float32 or float64; shares memory with a contiguous CPU tensor."""
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    array: NDArray[np.floating] = wide.detach().cpu().contiguous().reshape(-1).numpy()
    return array


def as_bool(mask: Tensor) -> NDArray[np.bool_]:
    """A mask as a flat NumPy array; shares memory with a contiguous CPU tensor."""
    array: NDArray[np.bool_] = mask.detach().cpu().contiguous().reshape(-1).numpy()
    return array


def pack_bits(masks: Mapping[str, Tensor]) -> bytes:
    """The masks in their order, one bit a weight: bit i of byte j is flat index 8j + i (least significant first).

    Each tensor starts on a byte of its own; the bits left over in its last byte are 0.
    """
    return b"".join(_bits(mask) for mask in masks.values())


def unpack_bits(data: bytes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The masks that `pack_bits` packed, given their names and shapes in the same order.

    Raises UserError where the length does not fit the shapes.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = sum((size + 7) // 8 for size in sizes.values())
    if len(data) != wanted:
        raise UserError(
            f"packed masks are {len(data):,} bytes, but these {len(sizes)} tensors need {wanted:,}: they were cut, or "
            "belong to another network"
        )
    masks: dict[str, Tensor] = {}
    start = 0
    for name, size in sizes.items():
        stop = start + (size + 7) // 8
        bits = np.unpackbits(np.frombuffer(data, np.uint8, stop - start, start), count=size, bitorder="little")
        masks[name] = torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shapes[name]))
        start = stop
    return masks


def digest(masks: Mapping[str, Tensor]) -> int:
    """A 63-bit hash (SHA-256, cut) of names, shapes and bits; the order of the dictionary does not matter."""
    names = sorted(masks)
    total = hashlib.sha256(json.dumps([[name, list(masks[name].shape)] for name in names]).encode())
    for name in names:
        total.update(_bits(masks[name]))
    return int.from_bytes(total.digest()[:8], "little") >> 1


def check(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], planned: Mapping[str, int]) -> list[str]:
    """The problems, a sentence each. Empty when every pruned weight is 0 and every count is as planned.

    -0.0 counts as 0; NaN does not. A tensor that is missing from one of the three arguments is a problem too.
    """
    problems: list[str] = []
    tables = {"weight": weights, "mask": masks, "plan": planned}
    for name in dict.fromkeys([*masks, *weights, *planned]):
        lacking = [what for what, table in tables.items() if name not in table]
        if lacking:
            problems.append(f"{name}: has no {' and no '.join(lacking)}")
            continue
        weight, mask = weights[name].detach(), masks[name].to(weights[name].device)
        if weight.shape != mask.shape:
            problems.append(f"{name}: weight is {tuple(weight.shape)} but its mask {tuple(mask.shape)}")
            continue
        awake = int(((weight != 0) & ~mask).sum())
        if awake:
            problems.append(f"{name}: {awake:,} pruned weights are not 0")
        kept = int(mask.sum())
        if kept != planned[name]:
            problems.append(f"{name}: the mask keeps {kept:,} weights, planned were {planned[name]:,}")
    return problems


class Applier:
    """Sets pruned weights to 0 after an update, all tensors in one fused multiplication.

    `weights[i]` and `masks[i]` have the same shape. The masks are held as 0 and 1 in the weights' dtype, device and
    memory format; tensors that keep everything cost nothing.
    """

    def __init__(self, weights: list[Tensor], masks: list[Tensor]) -> None:
        assert len(weights) == len(masks)
        assert all(w.shape == m.shape and m.dtype == torch.bool for w, m in zip(weights, masks, strict=True))
        self._count = len(weights)
        self._pruned = [i for i, mask in enumerate(masks) if not bool(mask.all())]
        self._weights = [weights[i] for i in self._pruned]
        # empty_like keeps the strides (channels_last): tensors laid out alike are what the fused kernel takes
        self._factors = [torch.empty_like(weights[i].detach()).copy_(masks[i]) for i in self._pruned]

    @torch.no_grad()
    def apply(self) -> None:
        """Multiply the weights by their masks: the pruned become 0.0 or -0.0; NaN stays, for the guard to find."""
        if self._weights:
            torch._foreach_mul_(self._weights, self._factors)

    @torch.no_grad()
    def zero(self, tensors: Sequence[Tensor | None]) -> None:
        """Zero the pruned entries of tensors that go with the weights (momentum); None where there is none yet."""
        assert len(tensors) == self._count
        found = [(tensors[i], factor) for i, factor in zip(self._pruned, self._factors, strict=True)]
        pairs = [(tensor, factor) for tensor, factor in found if tensor is not None]
        if pairs:
            torch._foreach_mul_([tensor for tensor, _ in pairs], [factor for _, factor in pairs])

    @torch.no_grad()
    def clean(self) -> None:
        """Set every pruned weight to +0.0, whatever it holds: the bits that a sparse file leaves out."""
        for weight, factor in zip(self._weights, self._factors, strict=True):
            weight.masked_fill_(factor == 0, 0.0)


def _bits(mask: Tensor) -> bytes:
    assert mask.dtype == torch.bool
    return np.packbits(as_bool(mask), bitorder="little").tobytes()
