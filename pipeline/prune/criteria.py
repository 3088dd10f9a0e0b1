"""Criteria: a weight tensor to a score for each weight; higher keeps.

To add one, write a function and put it into CRITERIA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.names import lookup
from pipeline.seeding import derive

Criterion = Callable[[Tensor, str, int], Tensor]


def magnitude(weight: Tensor, name: str, seed: int) -> Tensor:
    """|w|, the paper's criterion (section 3). Same shape and device as the weight, float32 or wider."""
    return _real(weight).abs()


def random(weight: Tensor, name: str, seed: int) -> Tensor:
    """The control: numbers in [0, 1) that depend on (seed, tensor name, shape) and on no weight.

    They are drawn on the CPU, so that a GPU and a CPU prune the same weights.
    """
    source = torch.Generator().manual_seed(derive(seed, "criterion", "random", name))
    return torch.rand(weight.shape, generator=source).to(weight.device)


def probabilistic(weight: Tensor, name: str, seed: int) -> Tensor:
    """The paper's control: |w| / e with e drawn from Exp(1), so weights are kept by chance, larger ones more often.

    The k highest are k draws without replacement, each with probability |w| / (sum of |w| not drawn yet): the same as
    the highest log|w| + Gumbel noise (Efraimidis and Spirakis 2006), but in the units of |w|, as thresholds need it. A
    weight keeps its e in every round, so rounds on unchanged weights end where one shot would. Drawn on the CPU.
    """
    source = torch.Generator().manual_seed(derive(seed, "criterion", "probabilistic", name))
    drawn = torch.empty(weight.shape).exponential_(generator=source).clamp_(min=torch.finfo(torch.float32).tiny)
    return magnitude(weight, name, seed) / drawn.to(weight.device)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "probabilistic": probabilistic, "random": random}


def scores(criterion: str, weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Scores of every tensor by name, shapes and order as in `weights`.

    Raises UserError for a criterion that is not in CRITERIA.
    """
    function = lookup(CRITERIA, criterion, "prune.criterion")
    return {name: function(weight.detach(), name, seed) for name, weight in weights.items()}


def _real(weight: Tensor) -> Tensor:
    """float16 and bfloat16 as float32 (exact), so that later divisions make no ties; others as they are."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
