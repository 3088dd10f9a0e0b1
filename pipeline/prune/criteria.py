"""Criteria: a weight tensor to a score for each weight; higher keeps.

To add one, write a function and put it into CRITERIA; one that needs a statistic of each weight, measured on train
samples (`statistics`), goes in as Measured with the statistic's name. A weight that is 0 scores 0 in all but random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.names import lookup
from pipeline.base.seeding import derive

Criterion = Callable[[Tensor, str, int], Tensor]  # weight, the tensor's name, seed


@dataclass(frozen=True)
class Measured:
    """A criterion of a weight tensor and a statistic shaped like it, whose kind `statistics.measure` knows."""

    statistic: str
    score: Callable[[Tensor, Tensor], Tensor]


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


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """The mean over small groups of samples of |w g|, g the gradient of the loss (Molchanov et al. 2017, first order).

    The absolute value is taken before the mean: in a trained network the mean gradient is about 0 whatever the weight
    does, and |w * mean g| would be noise.
    """
    return _real(weight).abs() * gradient


def obs(weight: Tensor, curvature: Tensor) -> Tensor:
    """Optimal brain surgeon on the layer's output (Hassibi and Stork 1993; layer by layer in Frantar et al. 2022).

    w² / [H⁻¹]_jj: the squared error of the output, summed over its positions and averaged over samples, that taking the
    weight away adds when the others of its row make up for it as well as they can. No labels. H is that of all inputs,
    also of those that are pruned in this row.
    """
    return _real(weight).square() * curvature


CRITERIA: dict[str, Criterion | Measured] = {
    "magnitude": magnitude,
    "taylor": Measured("gradient", taylor),
    "obs": Measured("curvature", obs),
    "probabilistic": probabilistic,
    "random": random,
}


def statistic_of(criterion: str) -> str | None:
    """The statistic that a criterion needs of each weight, or None. Raises UserError for an unknown criterion."""
    found = lookup(CRITERIA, criterion, "prune.criterion")
    return found.statistic if isinstance(found, Measured) else None


def scores(
    criterion: str, weights: dict[str, Tensor], seed: int, statistics: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Scores of every tensor by name, shapes and order as in `weights`.

    `statistics` are those that the criterion needs, if any (`statistic_of`), by tensor. Raises UserError for a
    criterion that is not in CRITERIA.
    """
    function = lookup(CRITERIA, criterion, "prune.criterion")
    if isinstance(function, Measured):
        assert statistics is not None, f"criterion {criterion} needs statistics"
        return {name: function.score(weight.detach(), statistics[name]) for name, weight in weights.items()}
    return {name: function(weight.detach(), name, seed) for name, weight in weights.items()}


def _real(weight: Tensor) -> Tensor:
    """float16 and bfloat16 as float32 (exact), so that later divisions make no ties; others as they are."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
