"""All tensors pruned together, as far as the scan of single ones suggests: how their damages compose.

No power by which single rises compose holds for every network and every size (`pipeline.prune.damage`; LeNet-5 wants
others than LeNet-300-100, and 2% others than 20%). So for some densities of all weights the allocation of least
predicted damage is solved under each power and measured: the best one is what `budget` goes by near that density. Its
measured rise also tells by how much predictions there are off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.calibrate import batch_norm
from pipeline.data.loader import Batch
from pipeline.prune import criteria, damage, patterns
from pipeline.prune.budget import Keep, Priced, solve
from pipeline.scan import levels, racing
from pipeline.scan.levels import Answers, answers_of
from pipeline.settings.config import Config

FILE = "together.json"  # in a run's scan folder: what was measured so far


def allocations(scan: Mapping[str, Any], classes: int, densities: Sequence[float]) -> dict[float, dict[float, Keep]]:
    """By density of all weights and by power, the allocation of least predicted damage; each tensor keeps a weight.

    Densities that leave some tensor without one are left out.
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
def measure(
    model: nn.Module,
    keeps: Sequence[Keep],
    batches: Sequence[Batch],
    dense: Answers,
    config: Config,
    device: torch.device,
    calibration: Sequence[Batch] = (),
    statistics: Mapping[str, Tensor] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield how the network answers all `batches` at each allocation, against its `dense` answers to them.

    As a level of the scan, so with batch norm's statistics of the `calibration` batches, if there are any. In between
    the network is as it was.
    """
    parameters, pattern = dict(model.named_parameters()), patterns.of(config.prune)
    for keep in keeps:
        weights = {name: parameters[name].detach().clone() for name in keep}
        norms = batch_norm.statistics(model)
        ranking = criteria.scores(config.prune.criterion, weights, config.seed, statistics)
        try:
            for name, count in keep.items():
                everything = torch.ones_like(weights[name], dtype=torch.bool)
                parameters[name].mul_(pattern.mask(ranking[name], everything, count))
            if calibration:
                batch_norm.recalibrate(model, calibration, config, device)
            given = answers_of(model, batches, config, device)
        finally:
            for name, weight in weights.items():
                parameters[name].copy_(weight)
            batch_norm.put_back(model, norms)
        yield {"samples": int(given.valid.sum()), **levels.against(given, dense, racing.critical(1))}
