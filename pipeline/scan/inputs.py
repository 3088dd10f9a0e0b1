"""What every level of a scan is measured with: network, masks, val batches, statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.seeding import generator
from pipeline.calibrate import batch_norm
from pipeline.calibrate.statistics import statistics_for
from pipeline.data.loader import Batch, EvalLoader
from pipeline.network.groups import Groups
from pipeline.network.survey import survey
from pipeline.prune import channels, criteria, patterns
from pipeline.prune.patterns import Pattern
from pipeline.scan import racing
from pipeline.settings.pruning import Prune, Scan
from pipeline.task.answers import Answers
from pipeline.task.feed import Feed, computing
from pipeline.train import checkpoint
from pipeline.train.session import Session


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """What every level of a scan is measured with. `model` is on `device`, and restored after each level.

    `batches` are the val batches (uint8) that levels are measured on. With racing, their order must be random and they
    must end at the looks (`shuffled`). `alive` are the masks that stay applied, by tensor; a tensor without a mask is
    wholly alive. If there are `calibration` batches (of train), batch norm's statistics are estimated on them at each
    level. `statistics` are the criterion's statistics of each weight, by tensor. Where whole channels are pruned,
    `groups` are theirs.
    """

    scan: Scan
    prune: Prune
    feed: Feed
    device: torch.device
    model: nn.Module
    batches: Sequence[Batch]
    alive: Mapping[str, Tensor] = field(default_factory=dict)
    calibration: Sequence[Batch] = ()
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    groups: Groups | None = None

    @property
    def pattern(self) -> Pattern:
        """How the weights that go must lie."""
        return patterns.of(self.prune)

    @torch.no_grad()
    def answers(self) -> Answers:
        """The answers of the network in its present state, in eval mode, to all batches."""
        self.model.eval()
        rows = []
        for batch in self.batches:
            output = self.feed.forward(self.model, batch.images.to(self.device), self.feed.eval_precision)
            rows.append(self.feed.task.judge(output, batch, None).cpu())
        return Answers.of(torch.cat(rows, 1), present=False)

    def prepared(self, number: int) -> Tensor:
        """What the network takes for batch `number`: (n, channels, height, width), float32, on the device."""
        images = self.batches[number].images.to(self.device, non_blocking=True)
        return self.feed.inputs(images)

    def computing(self) -> AbstractContextManager[Any]:
        """In the block forward passes compute in the precision of evaluation."""
        return computing(self.device, self.feed.eval_precision)

    def scores(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The criterion's scores of these tensors' weights; higher ones are kept."""
        return criteria.scores(self.prune.criterion, weights, self.feed.seed, self.statistics)

    def calibrate(self) -> None:
        """Estimate batch norm's statistics for the network in its present state, if there are calibration batches."""
        if self.calibration:
            batch_norm.recalibrate(self.model, self.calibration, self.feed, self.device)


def scan_inputs(opened: Session, source: str) -> ScanInputs:
    """What a scan of the network in checkpoint `source` needs."""
    config = opened.config
    model, saved = opened.new_model(), checkpoint.load(opened.run, source)
    model.load_state_dict(saved.weights)
    loader = EvalLoader(opened.split("val"), config.data, limit=config.scan.samples, seed=config.seed)
    if config.scan.interval is None:
        batches = [*loader.batches(0, 1)]
    else:
        batches = shuffled(loader.batches(0, 1), len(loader), config.data.eval_batch, config.seed)
    wanted = config.scan.bn_samples and batch_norm.norms(model)
    calibration = [*opened.calibration(config.scan.bn_samples)] if wanted else []
    prunable, _ = survey(model, config.prune.include, config.prune.exclude)
    statistics = statistics_for(opened, model, [tensor.name for tensor in prunable])
    return ScanInputs(
        scan=config.scan,
        prune=config.prune,
        feed=opened.feed,
        device=opened.world.device,
        model=model,
        batches=batches,
        alive=saved.masks,
        calibration=calibration,
        statistics=statistics,
        groups=channels.groups_of(model, prunable, opened.feed.zeros(2, opened.world.device), config.prune),
    )


def shuffled(batches: Iterable[Batch], samples: int, batch_size: int, seed: int) -> list[Batch]:
    """All samples in a random order given by the seed, in batches of at most batch_size that end at the looks.

    Some data are sorted by class. Without shuffling, the first samples would not represent all of them.
    """
    order = generator(seed, "scan", "order").permutation(samples)
    place = torch.empty(samples, dtype=torch.int64)
    place[torch.from_numpy(order)] = torch.arange(samples)
    parts: list[Tensor] | None = None
    first = 0
    for batch in batches:
        given = (batch.images, batch.labels, batch.weights, batch.indices)
        if parts is None:
            parts = [tensor.new_empty((samples, *tensor.shape[1:])) for tensor in given]
        for part, tensor in zip(parts, given, strict=True):
            part[place[first : first + len(tensor)]] = tensor
        first += len(batch.labels)
    assert first == samples
    assert parts is not None
    cuts = [0, *racing.looks(samples, racing=True)]
    sizes = [
        min(batch_size, end - start)
        for begin, end in itertools.pairwise(cuts)
        for start in range(begin, end, batch_size)
    ]
    return [Batch(*made) for made in zip(*(part.split(sizes) for part in parts), strict=True)]
