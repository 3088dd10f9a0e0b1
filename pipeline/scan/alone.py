"""What a level of the scan changes: one tensor, or one group of channels, pruned to one density after another and then
restored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from pipeline.calibrate import batch_norm
from pipeline.prune import channels, masks
from pipeline.prune.allocation import sigma
from pipeline.run.records import Difference, Level
from pipeline.scan import racing
from pipeline.scan.inputs import ScanInputs


class Alone:
    """A tensor, or a group of channels, that can be pruned to several densities, one after another, and restored.

    Densities are of its weights, or of the group's channels (`units` in all, of which `count` are alive). With
    `calibration` batches, a level also has its own batch norm statistics. For norms before the first of its tensors,
    these are the same at every level, but differ from the dense network's: `shared` sets them.
    """

    def __init__(self, given: ScanInputs, name: str) -> None:
        self._given, self._name = given, name
        self._group = given.groups.by_name[name] if given.groups is not None else None
        tensors = [name] if self._group is None else [*dict.fromkeys(each.tensor for each in self._group.members)]
        parameters = dict(given.model.named_parameters())
        self.weights = {tensor: parameters[tensor] for tensor in tensors}
        self.dense = {tensor: weight.detach().clone() for tensor, weight in self.weights.items()}
        if given.groups is not None:
            self.alive = torch.from_numpy(given.groups.alive(given.alive)[name])
        else:
            alive, weight = given.alive.get(name), self.dense[name]
            self.alive = torch.ones_like(weight, dtype=torch.bool) if alive is None else alive.to(weight.device)
        self.units, self.count = self.alive.numel(), int(self.alive.sum())
        self._statistics: list[batch_norm.Statistics] = []  # of each level, if there are calibration batches

    @torch.no_grad()
    def plan(self, densities: Sequence[float]) -> None:
        """Make the masks and statistics for `densities`, which fall. A level's number is its place in this list."""
        self.densities = densities
        self.keeps = [racing.kept(density, self.count) for density in densities]
        ranking = self._given.scores(self.dense)
        if self._group is None:
            self._scores = ranking[self._name]
            self.steps = {self._name: self._given.pattern.nested(self._scores, self.alive, self.keeps)}
        else:
            steps = masks.nested(channels.unit_scores(self._group, ranking), self.alive, self.keeps)
            self.steps = {
                name: channels.spread(self._group, name, steps, len(densities), weight)
                for name, weight in self.dense.items()
            }
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
        """In this block nothing is pruned, and every norm before it has the statistics that all levels share."""
        with self._put_back():
            if self._statistics:
                batch_norm.put_back(self._given.model, self._statistics[0])
            yield

    def quality(self, number: int) -> float:
        """threshold / std: the lowest score that a level keeps, in standard deviations of the alive weights.

        Scored by magnitude this is the paper's quality (section 3). 0 for a group of channels, which has no threshold
        of single weights.
        """
        if self._group is not None:
            return 0.0
        smallest = float(torch.where(self.steps[self._name] > number, self._scores, math.inf).min())
        std = sigma(self.dense[self._name][self.alive])
        return smallest / std if std > 0 else 0.0

    def level(self, number: int, seen: Difference, method: str) -> Level:
        """The record of a level whose measured difference is `seen`; `method` is the suffix's."""
        return Level(
            density=self.densities[number],
            kept=self.keeps[number],
            absolute=self.keeps[number] / self.units,
            quality=self.quality(number),
            method=method,
            **vars(seen),
        )

    def _mask(self, number: int) -> None:
        for name, weight in self.weights.items():
            torch.mul(self.dense[name], self.steps[name] > number, out=weight.data)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        before = batch_norm.statistics(self._given.model) if self._given.calibration else []
        try:
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data.copy_(self.dense[name])
            if self._given.calibration:
                batch_norm.put_back(self._given.model, before)
