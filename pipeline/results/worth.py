"""Which figures are worth a look: one that would show a point or two is left out, its numbers stand in a table."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.run.records import DenseMetrics, RoundMetrics, Scan, WeightHistogram

_FEW_WEIGHTS = 100  # a histogram of fewer is mostly gaps


def rounds(metrics: Sequence[RoundMetrics]) -> bool:
    """Accuracy against compression: several attempts at rounds."""
    return len(metrics) > 1


def training(dense: DenseMetrics | None, metrics: Sequence[RoundMetrics]) -> bool:
    """Loss and accuracy by epoch: some training of several epochs, and enough of them together."""
    lengths = [len(part.history) for part in (dense, *metrics) if part is not None]
    return max(lengths, default=0) > 1 and sum(lengths) > 3


def sensitivity(scan: Scan) -> bool:
    """Accuracy of each tensor against the weights kept: lines, not points."""
    return any(len(tensor.levels) > 1 for tensor in scan.tensors)


def histogram(tensor: WeightHistogram) -> bool:
    """A tensor's weights before and after: enough weights, some of them kept."""
    return sum(tensor.before) >= _FEW_WEIGHTS and any(tensor.after)
