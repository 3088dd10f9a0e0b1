"""Allocations as tests ask for them: limits as densities by name, as the settings have them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.prune import allocation
from pipeline.prune.allocation import Request
from pipeline.prune.limits import bounds


def request(
    scores: dict[str, Tensor],
    alive: dict[str, Tensor],
    budget: int = 0,
    *,
    min_weights: int = 1,
    floors: dict[str, float] | None = None,
    ceilings: dict[str, float] | None = None,
    **more: Any,
) -> Request:
    """The request of a budget within these limits."""
    sizes = {name: score.numel() for name, score in scores.items()}
    living = {name: int(mask.sum()) for name, mask in alive.items()}
    return Request(scores, alive, budget, *bounds(sizes, living, min_weights, floors or {}, ceilings or {}), **more)


def allocate(
    name: str,
    scores: dict[str, Tensor],
    alive: dict[str, Tensor],
    budget: int,
    *,
    min_weights: int = 1,
    **more: Any,
) -> dict[str, int]:
    """The weights that each tensor keeps by the allocation of this name."""
    return allocation.allocate(name, request(scores, alive, budget, min_weights=min_weights, **more), min_weights)
