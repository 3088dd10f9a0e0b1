"""Criteria: a weight tensor to a score for each weight; higher keeps.

To add one, write a function from Weighed to scores and put it into CRITERIA. If it needs a statistic of each weight,
name that too (`pipeline.calibrate.statistics`). A weight that is 0 scores 0 under every criterion but random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.names import lookup
from pipeline.base.seeding import derive
from pipeline.settings.pruning import Prune


@dataclass(frozen=True)
class Weighed:
    """What a criterion is given: a tensor's weights, its name, the run's seed, and the statistic that it needs.

    `statistic` has the weights' shape; None where the criterion needs none.
    """

    weight: Tensor
    name: str
    seed: int
    statistic: Tensor | None

    @property
    def measured(self) -> Tensor:
        """The statistic, of a criterion that needs one."""
        assert self.statistic is not None, f"{self.name}: the criterion needs a statistic"
        return self.statistic


@dataclass(frozen=True)
class Criterion:
    """A way to score weights: the function, whose result has the weights' shape, and the statistic that it needs.

    `statistic` is a name in `pipeline.calibrate.statistics.STATISTICS`; None where the weights are enough.
    """

    score: Callable[[Weighed], Tensor]
    statistic: str | None = None


def magnitude(given: Weighed) -> Tensor:
    """|w|, the paper's criterion (section 3). Same shape and device as the weight, float32 or wider."""
    return _real(given.weight).abs()


def random(given: Weighed) -> Tensor:
    """The control: numbers in [0, 1) that depend on (seed, tensor name, shape) and on no weight.

    They are drawn on the CPU, so that a GPU and a CPU prune the same weights.
    """
    source = torch.Generator().manual_seed(derive(given.seed, "criterion", "random", given.name))
    return torch.rand(given.weight.shape, generator=source).to(given.weight.device)


def probabilistic(given: Weighed) -> Tensor:
    """The paper's control: |w| / e with e drawn from Exp(1), so weights are kept by chance, larger ones more often.

    The k highest are k draws without replacement, each with probability |w| / (sum of |w| not drawn yet): the same as
    the highest log|w| + Gumbel noise (Efraimidis and Spirakis 2006), but in the units of |w|, as thresholds need it. A
    weight keeps its e in every round, so rounds on unchanged weights end where one shot would. Drawn on the CPU.
    """
    source = torch.Generator().manual_seed(derive(given.seed, "criterion", "probabilistic", given.name))
    drawn = torch.empty(given.weight.shape).exponential_(generator=source).clamp_(min=torch.finfo(torch.float32).tiny)
    return magnitude(given) / drawn.to(given.weight.device)


def taylor(given: Weighed) -> Tensor:
    """The mean over small groups of samples of |w g|, g the gradient of the loss (Molchanov et al. 2017, first order).

    The absolute value is taken before the mean: in a trained network the mean gradient is about 0 whatever the weight
    does, and |w * mean g| would be noise.
    """
    return _real(given.weight).abs() * given.measured


def obs(given: Weighed) -> Tensor:
    """Optimal brain surgeon on the layer's output (Hassibi and Stork 1993; layer by layer in Frantar et al. 2022).

    The score is w² / [H⁻¹]_jj: the squared error that removing the weight adds to the output, when the other weights of
    its row compensate as well as they can. The error is summed over output positions and averaged over samples. No
    labels are needed. H is over all inputs of the layer, pruned weights of this row included.
    """
    return _real(given.weight).square() * given.measured


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "taylor": Criterion(taylor, statistic="gradient"),
    "obs": Criterion(obs, statistic="curvature"),
    "probabilistic": Criterion(probabilistic),
    "random": Criterion(random),
}


def of(prune: Prune) -> Criterion:
    """The criterion that the settings name. Raises UserError for an unknown one."""
    return lookup(CRITERIA, prune.criterion, "prune.criterion")


def scores(
    criterion: str, weights: dict[str, Tensor], seed: int, statistics: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Scores of every tensor by name, shapes and order as in `weights`.

    `statistics` are those that the criterion needs, if any, by tensor. Raises UserError for a criterion that is not in
    CRITERIA.
    """
    chosen = lookup(CRITERIA, criterion, "prune.criterion")
    needed = (statistics or {}) if chosen.statistic else {}
    return {
        name: chosen.score(Weighed(weight.detach(), name, seed, needed.get(name))) for name, weight in weights.items()
    }


def _real(weight: Tensor) -> Tensor:
    """float16 and bfloat16 as float32 (exact), so that later divisions make no ties; others as they are."""
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
