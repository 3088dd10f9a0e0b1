"""One tensor of a network, pruned to one density after the other and put back: what a level of the scan changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline.calibrate import batch_norm
from pipeline.prune.allocation import sigma
from pipeline.run.records import Difference, Level
from pipeline.scan import racing
from pipeline.scan.inputs import ScanInputs


class OneTensor:
    """A tensor, which can be pruned to some densities, one after the other, and put back.

    With `calibration` batches a level also has batch norm statistics of its own. Those of norms that come before the
    tensor are the same at every level, but not the dense network's: `shared` sets them.
    """

    def __init__(self, given: ScanInputs, name: str) -> None:
        self.weight = dict(given.model.named_parameters())[name]
        self.dense = self.weight.detach().clone()
        alive = given.alive.get(name)
        self.alive = torch.ones_like(self.dense, dtype=torch.bool) if alive is None else alive.to(self.dense.device)
        self.count = int(self.alive.sum())
        self.std = sigma(self.dense[self.alive])
        self._given, self._name = given, name
        self._statistics: list[batch_norm.Statistics] = []  # of each level, if there are calibration batches

    @torch.no_grad()
    def plan(self, densities: Sequence[float]) -> None:
        """Make the masks of some densities, falling, and the statistics: their places in the list are their numbers."""
        self.densities = densities
        self.keeps = [racing.kept(density, self.count) for density in densities]
        ranking = self._given.scores({self._name: self.dense})[self._name]
        self.steps = self._given.pattern.nested(ranking, self.alive, self.keeps)
        self._statistics = []
        if self._given.calibration:
            with self._put_back():
                for number in range(len(densities)):
                    self._mask(number)
                    self._given.calibrate()
                    self._statistics.append(batch_norm.statistics(self._given.model))

    @contextmanager
    def pruned(self, numbers: Iterable[int]) -> Iterator[Iterator[int]]:
        """An iterator that prunes to each level in turn; afterwards the network is put back, also after an error."""

        def each() -> Iterator[int]:
            for number in numbers:
                self._mask(number)
                if self._statistics:
                    batch_norm.put_back(self._given.model, self._statistics[number])
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
                batch_norm.put_back(self._given.model, self._statistics[0])
            yield

    def quality(self, number: int) -> float:
        """threshold / std: the smallest weight that a level keeps, in standard deviations of those alive."""
        smallest = float(torch.where(self.steps > number, self.dense.abs(), math.inf).min())
        return smallest / self.std if self.std > 0 else 0.0

    def level(self, number: int, seen: Difference, method: str) -> Level:
        """The record of a level from how the network answered at it; `method` is that of the suffix."""
        return Level(
            density=self.densities[number],
            kept=self.keeps[number],
            absolute=self.keeps[number] / self.dense.numel(),
            quality=self.quality(number),
            method=method,
            **vars(seen),
        )

    def _mask(self, number: int) -> None:
        torch.mul(self.dense, self.steps > number, out=self.weight.data)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        before = batch_norm.statistics(self._given.model) if self._given.calibration else []
        try:
            yield
        finally:
            self.weight.data.copy_(self.dense)
            if self._given.calibration:
                batch_norm.put_back(self._given.model, before)
