"""The sensitivity scan: each tensor pruned alone at several densities, on val, without retraining (figure 6).

With prune.pattern=channels each group of channels stands where a tensor stands otherwise.

The outer loop is over batches, the inner one over levels. What a level cannot change is computed once for a batch
(`suffix`), and a level that is decided sees no more batches (`racing`). Every level is compared with the dense
network's answers, sample by sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.base.stats import paired_mean, tango, wilson
from pipeline.data.loader import Batch
from pipeline.network.trace import State, nbytes
from pipeline.prune import masks
from pipeline.run.records import Difference, Level
from pipeline.scan import racing, suffix
from pipeline.scan.alone import Alone
from pipeline.scan.inputs import ScanInputs
from pipeline.task.answers import Answers

CHUNK_BYTES = 2**28  # of shared states held at a time; what is pruned is masked anew for each level and chunk
PROBE = 2  # samples on which a cut is tried


def scan_part(given: ScanInputs, dense: Answers, name: str, known: Sequence[Level] = ()) -> Generator[Level]:
    """Yield the levels of one tensor, or group, that are not `known` yet. The network is restored before each yield.

    `dense` are the answers of the network as given, to the same batches.
    """
    given.model.eval()
    part = Alone(given, name)
    prefixes: _Prefixes | None = None
    levels = list(known)
    while wanted := racing.next_levels(levels, given.scan, part.count):
        part.plan(wanted[: masks.MOST_NESTED])
        if prefixes is None:
            prefixes = _Prefixes(given, part)
        for level in _measure(prefixes, dense):
            levels.append(level)
            yield level


class _Prefixes:
    """The part of each batch's forward pass that all levels share, in chunks of CHUNK_BYTES.

    In mode adaptive, the first CHUNK_BYTES are kept for levels that are added later.
    """

    def __init__(self, given: ScanInputs, part: Alone) -> None:
        self.given, self.part = given, part
        self.ends = np.cumsum([len(batch.labels) for batch in given.batches])
        self.kept: dict[int, State] | None = {} if given.scan.mode == "adaptive" else None
        self.kept_bytes = 0
        with torch.no_grad(), part.shared(), given.computing():
            example = given.prepared(0)[:PROBE]
            self.suffix = suffix.choose(given.model, [*part.weights.values()], example, part.at_first_level)

    def chunks(self, start: int, stop: int) -> Iterator[list[tuple[Batch, State]]]:
        """The batches that hold samples start to stop, with their states."""
        chunk: list[tuple[Batch, State]] = []
        held = 0
        for number in np.flatnonzero((self.ends > start) & (self.ends <= stop)).tolist():
            state = self._state(number)
            chunk.append((self.given.batches[number], state))
            held += nbytes(state)
            if held >= CHUNK_BYTES:
                yield chunk
                chunk, held = [], 0
        if chunk:
            yield chunk

    def _state(self, number: int) -> State:
        if self.kept is not None and number in self.kept:
            return self.kept[number]
        with self.part.shared(), self.given.computing():
            state = self.suffix.prepare(self.given.prepared(number))
        size = nbytes(state)
        if self.kept is not None and self.kept_bytes + size <= CHUNK_BYTES:
            self.kept[number] = state
            self.kept_bytes += size
        return state


@torch.no_grad()
def _measure(prefixes: _Prefixes, dense: Answers) -> list[Level]:
    """The planned levels, in turn, each on as many samples as it takes."""
    part, settings, judge = prefixes.part, prefixes.given.scan, prefixes.given.feed.task.judge
    looks = racing.looks(len(dense.right), settings.interval is not None)
    z, dense_top1 = racing.critical(len(looks)), dense.figures().top1
    rows: list[list[Tensor]] = [[] for _ in part.densities]
    found: dict[int, Level] = {}
    for start, look in itertools.pairwise([0, *looks]):
        for chunk in prefixes.chunks(start, look):
            undecided = [i for i in range(len(rows)) if i not in found]
            with prefixes.given.computing(), part.pruned(undecided) as turns:
                for i in turns:
                    rows[i] += [judge(prefixes.suffix.finish(s).float(), batch, None).cpu() for batch, s in chunk]
        for i in [i for i in range(len(rows)) if i not in found]:
            seen = against(Answers.of(torch.cat(rows[i], 1), present=False), dense, z)
            if look == looks[-1] or racing.decided(seen.drop_low, seen.drop_high, dense_top1, settings):
                found[i] = part.level(i, seen, prefixes.suffix.method)
        if len(found) == len(rows):
            break
    return [found[i] for i in range(len(rows))]


def against(given: Answers, dense: Answers, z: float) -> Difference:
    """Compare answers to the first samples with the dense network's answers; z is the normal quantile of the
    confidence.

    At least one of the samples must be readable. With only one, the rise has no interval.
    """
    first = dense.first(len(given.right))
    before, after = first.right[given.valid], given.right[given.valid]
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    drop_low, drop_high = tango(lost, won, len(after), z)
    rises = given.loss[given.valid] - first.loss[given.valid]
    rise_low, rise_high = paired_mean(rises, z)
    bounded = math.isfinite(rise_low)
    top1, low, high, loss = _on_all(given, dense, z)
    return Difference(
        samples=len(after),
        top1=top1,
        low=low,
        high=high,
        drop=(lost - won) / len(after),
        drop_low=drop_low,
        drop_high=drop_high,
        loss=loss,
        rise=math.fsum(rises) / len(rises),
        rise_low=rise_low if bounded else None,
        rise_high=rise_high if bounded else None,
    )


def _on_all(given: Answers, dense: Answers, z: float) -> tuple[float, float, float, float]:
    """top1, low, high and loss, for all samples.

    Where only the first samples were measured, the difference to the dense network on these is added to the dense
    network's figures on all samples.
    """
    part = given.figures()
    if len(given.right) == len(dense.right):
        return part.top1, *given.interval(z), part.loss
    whole, beside = dense.figures(), dense.first(len(given.right)).figures()
    top1 = min(1.0, max(0.0, whole.top1 - (beside.top1 - part.top1)))
    return top1, *wilson(top1 * part.samples, part.samples, z), whole.loss + part.loss - beside.loss
