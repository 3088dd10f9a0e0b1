"""Patterns: which sets of a tensor's weights may be pruned together.

To add one, write its functions and put it into PATTERNS. Patterns n:m are a family, made from the numbers in the name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.prune import masks
from pipeline.settings.pruning import Prune

_N_OF_M = re.compile(r"(\d{1,3}):(\d{1,3})")


@dataclass(frozen=True)
class Pattern:
    """How masks of a tensor are made from its scores.

    mask(scores, alive, keep): bool, True keeps exactly `keep` of the weights that are alive.
    nested(scores, alive, keeps): uint8, how many of the masks for falling `keeps` keep each weight: mask i is
    `nested(...) > i`.
    granularity(shape): the weights of a tensor of this shape that go together; every kept count is a multiple of it.
    most(alive): how many of the weights that are alive a round may keep, for the mask to have the pattern. A mask that
    keeps more, as the scan and gradual pruning make them, comes as near to it as it can.
    free: any number of weights may be kept, and those with the highest scores are. Else there is no one threshold.
    channels: whole channels go, each from several tensors at once (`pipeline.prune.channels`); `mask` and `nested` of a
    single tensor are not used.
    """

    mask: Callable[[Tensor, Tensor, int], Tensor]
    nested: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    granularity: Callable[[Sequence[int]], int]
    most: Callable[[Tensor], int]
    free: bool = True
    channels: bool = False


def n_of_m(n: int, m: int) -> Pattern:
    """At most `n` non-zero weights in each group of `m` inputs that follow one another (dimension 1), at one position.

    2:4 is what NVIDIA's sparse tensor cores take (compute capability 8.0 and later). A last group of fewer than `m`
    inputs keeps at most `n` too. Within their groups the `n` highest are before all others; beyond that the highest
    stay, wherever they are. So any number can be kept, and from `most` on downwards each mask has the pattern.
    """

    def split(scores: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        """The living weights that are among the n highest of their groups, and the others."""
        core = _highest(scores, alive, n, m)
        return core, alive.to(core.device) & ~core

    def mask(scores: Tensor, alive: Tensor, keep: int) -> Tensor:
        core, rest = split(scores, alive)
        count = int(core.sum())
        if keep <= count:
            return masks.top_mask(scores, core, keep)
        return core.to(scores.device) | masks.top_mask(scores, rest, keep - count)

    def nested(scores: Tensor, alive: Tensor, keeps: Sequence[int]) -> Tensor:
        core, rest = split(scores, alive)
        count = int(core.sum())
        beyond = [keep - count for keep in keeps if keep > count]
        found = masks.nested(scores, core, keeps[len(beyond) :])
        found += len(beyond) * core.to(scores.device, torch.uint8)
        return found + masks.nested(scores, rest, beyond) if beyond else found

    def most(alive: Tensor) -> int:
        return int(np.minimum(_grouped(masks.as_bool(alive).reshape(alive.shape), m, False).sum(-1), n).sum())

    return Pattern(mask, nested, lambda shape: 1, most, free=False)


def _grouped(values: NDArray[Any], m: int, filler: float) -> NDArray[Any]:
    """Values (outputs, inputs, ...) as (outputs, ..., groups, m); a last group that is short is filled."""
    last = np.moveaxis(values, 1, -1)
    short = -last.shape[-1] % m
    if short:
        last = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, short)], constant_values=filler)
    return last.reshape(*last.shape[:-1], -1, m)


def _highest(scores: Tensor, alive: Tensor, n: int, m: int) -> Tensor:
    """The living weights whose scores are among the n highest of their group; of equal ones the first."""
    shape = tuple(scores.shape)
    living = masks.as_bool(alive).reshape(shape)
    values = np.where(living, masks.as_array(scores).reshape(shape), -np.inf)
    order = np.argsort(-_grouped(values, m, -np.inf), axis=-1, kind="stable")
    core = np.zeros(order.shape, np.bool_)
    np.put_along_axis(core, order[..., :n], True, axis=-1)
    outputs_last = core.reshape(*core.shape[:-2], -1)[..., : shape[1]]
    found = np.ascontiguousarray(np.moveaxis(outputs_last, -1, 1)) & living
    return torch.from_numpy(found)


PATTERNS: dict[str, Pattern] = {
    "weights": Pattern(masks.top_mask, masks.nested, lambda shape: 1, lambda alive: int(alive.sum())),
    "channels": Pattern(
        masks.top_mask, masks.nested, lambda shape: 1, lambda alive: int(alive.sum()), free=False, channels=True
    ),
}


def of(prune: Prune) -> Pattern:
    """The pattern that the settings name. Raises UserError for an unknown one."""
    return _named(prune.pattern)


@functools.cache
def _of_numbers(n: int, m: int) -> Pattern:
    return n_of_m(n, m)


def _named(name: str) -> Pattern:
    found = _N_OF_M.fullmatch(name)
    if found is None:
        return lookup(PATTERNS | {"2:4": _of_numbers(2, 4)}, name, "prune.pattern")
    n, m = int(found[1]), int(found[2])
    if not 1 <= n < m:
        raise UserError(
            f"prune.pattern={name}: keeps at most n of m, as in 2:4, 4:8 or 1:4; n is at least 1, and below m"
        )
    return _of_numbers(n, m)


def most(prune: Prune, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many weights of each tensor a round may keep, where all are alive."""
    pattern, one = of(prune), torch.ones((), dtype=torch.bool)
    return {name: pattern.most(one.expand(tuple(shape))) for name, shape in shapes.items()}
