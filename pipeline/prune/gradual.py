"""Gradual pruning: within a round's retraining its weights are pruned little by little instead of all at once.

Zhu and Gupta 2017, "To prune, or not to prune": between two prunes the remaining weights learn to do without the pruned
ones, so a small network learns more. Every prune is planned like a round (criterion, allocation, exact counts), from
the weights at that moment. Masks only shrink: a pruned weight never comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.prune.schedules import cubic_density

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Gradual:
    """How a round is pruned gradually, from density `before` to `after`.

    `prune(density, alive, last)` makes the masks for a density. All ranks call it together and get equal masks. Prunes
    happen in the first `share` of the updates, one every `every` updates.
    """

    prune: Callable[[float, Masks, bool], Masks]
    before: float
    after: float
    share: float
    every: int

    def end(self, total: int) -> int:
        """The update (from 0, of `total`) before which the last prune is made."""
        return min(int(self.share * total), total - 1)

    def due(self, step: int, total: int) -> bool:
        """Whether there is a prune before update `step`."""
        return step == self.end(total) or (step < self.end(total) and step % self.every == 0)

    def masks(self, step: int, total: int, alive: Masks) -> Masks:
        """The masks from update `step` on, of those that are alive; at the end exactly those of density `after`."""
        last = step == self.end(total)
        density = self.after if last else cubic_density(self.before, self.after, step / self.end(total))
        return self.prune(density, alive, last)
