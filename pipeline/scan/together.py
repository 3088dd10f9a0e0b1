"""How the damages of single tensors add up: all tensors pruned together and measured.

No one rule for adding them up holds for every network and every size (`pipeline.prune.damage`): LeNet-5 wants another
power than LeNet-300-100, and a density of 2% another one than 20%. So the scan tries several powers. For each density
and power it solves the allocation of least predicted damage, prunes all tensors to it and measures the loss. Near that
density `budget` then uses the power that raised the loss least. The measured rise also corrects the predictions there.

With prune.pattern=channels, groups stand where tensors stand, and densities are of all channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.calibrate import batch_norm
from pipeline.prune import channels, damage
from pipeline.prune.budget import Keep, Priced, solve
from pipeline.run.records import Difference, Scan
from pipeline.scan import racing
from pipeline.scan.inputs import ScanInputs
from pipeline.scan.levels import against
from pipeline.task.answers import Answers


def allocations(scan: Scan, classes: int, densities: Sequence[float]) -> dict[float, dict[float, Keep]]:
    """The allocation of least predicted damage, by density of all weights and by power. Each tensor keeps a weight.

    Densities too low for one weight in each tensor are left out.
    """
    found: dict[float, dict[float, Keep]] = {density: {} for density in densities}
    for power in damage.POWERS:
        curves = damage.curves(scan, classes, power)
        priced = {name: Priced(curve, int) for name, curve in curves.items()}
        sizes = {name: curve.weights for name, curve in curves.items()}
        for density in densities:
            budget = round(density * sum(sizes.values()))
            if budget >= len(sizes):
                found[density][power] = solve(priced, dict.fromkeys(sizes, 1), sizes, budget).keep
    return {density: made for density, made in found.items() if made}


@torch.no_grad()
def measure(given: ScanInputs, dense: Answers, keeps: Sequence[Keep]) -> Iterator[Difference]:
    """Yield, for each allocation, how the network's answers to all batches differ from its `dense` answers.

    As for a level of the scan, batch norm's statistics are estimated on the calibration batches, if there are any.
    Masks in `given.alive` are ignored. The network is restored before each yield.
    """
    parameters = dict(given.model.named_parameters())
    for keep in keeps:
        names = keep if given.groups is None else given.groups.shapes
        weights = {name: parameters[name].detach().clone() for name in names}
        norms = batch_norm.statistics(given.model)
        ranking = given.scores(weights)
        try:
            for name, mask in _masks(given, ranking, keep).items():
                parameters[name].mul_(mask)
            given.calibrate()
            answers = given.answers()
        finally:
            for name, weight in weights.items():
                parameters[name].copy_(weight)
            batch_norm.put_back(given.model, norms)
        yield against(answers, dense, racing.critical(1))


def _masks(given: ScanInputs, ranking: dict[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    """The masks of all tensors where each tensor, or each group, keeps so many."""
    if given.groups is not None:
        units = channels.scores(given.groups, ranking)
        made = channels.masks(given.groups, units, given.groups.whole, keep)
        return {name: mask.to(ranking[name].device) for name, mask in made.items()}
    everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in ranking.items()}
    return {name: given.pattern.mask(ranking[name], everything[name], count) for name, count in keep.items()}
