"""What a level of the scan changes: one tensor of a network, pruned to one density after another and then restored."""

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
    """A tensor that can be pruned to several densities, one after another, and restored.

    With `calibration` batches, a level also has its own batch norm statistics. For norms before the tensor, these are
    the same at every level, but differ from the dense network's: `shared` sets them.
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
        """Make the masks and statistics for `densities`, which fall. A level's number is its place in this list."""
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
        """An iterator that prunes to each level in turn. The network is restored at the end, also after an error."""

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
        """In this block the tensor is whole, and every norm before it has the statistics that all levels share."""
        with self._put_back():
            if self._statistics:
                batch_norm.put_back(self._given.model, self._statistics[0])
            yield

    def quality(self, number: int) -> float:
        """threshold / std: the smallest weight that a level keeps, in standard deviations of the alive weights."""
        smallest = float(torch.where(self.steps > number, self.dense.abs(), math.inf).min())
        return smallest / self.std if self.std > 0 else 0.0

    def level(self, number: int, seen: Difference, method: str) -> Level:
        """The record of a level whose measured difference is `seen`; `method` is the suffix's."""
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
