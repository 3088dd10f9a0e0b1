"""Patterns: which sets of a tensor's weights may be pruned together.

To add one, write its functions and put it into PATTERNS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.base.names import lookup
from pipeline.prune.masks import nested, top_mask
from pipeline.settings.pruning import Prune


@dataclass(frozen=True)
class Pattern:
    """How masks of a tensor are made from its scores.

    mask(scores, alive, keep): bool, True keeps exactly `keep` of the weights that are alive.
    nested(scores, alive, keeps): uint8, how many of the masks for falling `keeps` keep each weight: mask i is
    `nested(...) > i`.
    granularity(shape): the weights of a tensor of this shape that go together; every kept count is a multiple of it.
    """

    mask: Callable[[Tensor, Tensor, int], Tensor]
    nested: Callable[[Tensor, Tensor, Sequence[int]], Tensor]
    granularity: Callable[[Sequence[int]], int]


PATTERNS: dict[str, Pattern] = {
    "weights": Pattern(top_mask, nested, lambda shape: 1),
}


def of(prune: Prune) -> Pattern:
    """The pattern that the settings name. Raises UserError for an unknown one."""
    return lookup(PATTERNS, prune.pattern, "prune.pattern")
