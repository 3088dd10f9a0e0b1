"""One tensor of a network, pruned to one density after the other and put back: what a level of the scan changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.calibrate import batch_norm
from pipeline.data.loader import Batch
from pipeline.prune import patterns
from pipeline.prune.allocation import sigma
from pipeline.prune.criteria import scores
from pipeline.scan import racing
from pipeline.settings.config import Config


class OneTensor:
    """A tensor, which can be pruned to some densities, one after the other, and put back.

    With `calibration` batches a level also has batch norm statistics of its own. Those of norms that come before the
    tensor are the same at every level, but not the dense network's: `shared` sets them.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        config: Config,
        device: torch.device,
        alive: Tensor | None,
        calibration: Sequence[Batch],
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.weight = model, dict(model.named_parameters())[name]
        self.dense = self.weight.detach().clone()
        self.alive = torch.ones_like(self.dense, dtype=torch.bool) if alive is None else alive.to(self.dense.device)
        self.count = int(self.alive.sum())
        self.std = sigma(self.dense[self.alive])
        self._name, self._config, self._device, self._calibration = name, config, device, calibration
        self._criterion_needs = statistics
        self._statistics: list[batch_norm.Statistics] = []  # of each level, if there are calibration batches

    @torch.no_grad()
    def plan(self, densities: Sequence[float]) -> None:
        """Make the masks of some densities, falling, and the statistics: their places in the list are their numbers."""
        self.densities = densities
        self.keeps = [racing.kept(density, self.count) for density in densities]
        criterion, seed = self._config.prune.criterion, self._config.seed
        ranking = scores(criterion, {self._name: self.dense}, seed, self._criterion_needs)[self._name]
        self.steps = patterns.of(self._config.prune).nested(ranking, self.alive, self.keeps)
        self._statistics = []
        if self._calibration:
            with self._put_back():
                for number in range(len(densities)):
                    self._mask(number)
                    batch_norm.recalibrate(self.model, self._calibration, self._config, self._device)
                    self._statistics.append(batch_norm.statistics(self.model))

    @contextmanager
    def pruned(self, numbers: Iterable[int]) -> Iterator[Iterator[int]]:
        """An iterator that prunes to each level in turn; afterwards the network is put back, also after an error."""

        def each() -> Iterator[int]:
            for number in numbers:
                self._mask(number)
                if self._statistics:
                    batch_norm.put_back(self.model, self._statistics[number])
                yield number

        with self._put_back():
            yield each()

    @contextmanager
    def at_first_level(self) -> Iterator[None]:
        """Pruned to the first level in this block."""
        with self.pruned([0]) as turns:
            next(turns)
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        """The whole tensor, and of every norm that comes before it the statistics that all levels have."""
        with self._put_back():
            if self._statistics:
                batch_norm.put_back(self.model, self._statistics[0])
            yield

    def quality(self, number: int) -> float:
        """threshold / std: the smallest weight that a level keeps, in standard deviations of those alive."""
        smallest = float(torch.where(self.steps > number, self.dense.abs(), math.inf).min())
        return smallest / self.std if self.std > 0 else 0.0

    def _mask(self, number: int) -> None:
        torch.mul(self.dense, self.steps > number, out=self.weight.data)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        before = batch_norm.statistics(self.model) if self._calibration else []
        try:
            yield
        finally:
            self.weight.data.copy_(self.dense)
            if self._calibration:
                batch_norm.put_back(self.model, before)
