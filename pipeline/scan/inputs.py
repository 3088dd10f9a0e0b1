"""What every level of a scan is measured with: network, masks, val batches, statistics."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from pipeline.calibrate import batch_norm
from pipeline.calibrate.statistics import statistics_for
from pipeline.data.loader import Batch, EvalLoader
from pipeline.network.survey import survey
from pipeline.scan import levels
from pipeline.train import checkpoint
from pipeline.train.session import Session


class ScanInputs(NamedTuple):
    """The network and masks of a checkpoint, the val batches (uint8) that levels are measured on, those of train that
    batch norm is calibrated on, and the statistics of the weights that the criterion needs, by tensor."""

    model: nn.Module
    alive: dict[str, Tensor]
    batches: list[Batch]
    calibration: list[Batch]
    statistics: dict[str, Tensor]


def scan_inputs(opened: Session, source: str) -> ScanInputs:
    """What every level of a scan of checkpoint `source` needs."""
    config = opened.config
    model, saved = opened.new_model(), checkpoint.load(opened.run, source)
    model.load_state_dict(saved.weights)
    loader = EvalLoader(opened.split("val"), config.data, limit=config.scan.samples, seed=config.seed)
    if config.scan.interval is None:
        batches = [*loader.batches(0, 1)]
    else:
        batches = levels.shuffled(loader.batches(0, 1), len(loader), config.data.eval_batch, config.seed)
    wanted = config.scan.bn_samples and batch_norm.norms(model)
    calibration = [*opened.calibration(config.scan.bn_samples)] if wanted else []
    prunable, _ = survey(model, config.prune.include, config.prune.exclude)
    statistics = statistics_for(opened, model, [tensor.name for tensor in prunable])
    return ScanInputs(model, saved.masks, batches, calibration, statistics)
