"""How long a network takes by the channels that it keeps: a table of measured times, made into a price.

Each step of the network reads and makes some channels. Its time is taken for a sum of a constant, a part in proportion
to each of the two numbers, and one to their product; the four are fitted to the times that were measured at several
widths, none below 0 (non-negative least squares on relative errors). So fewer channels never take longer. The steps'
times without their constants add up, and two further numbers, fitted to whole passes, turn the sum into the time of a
pass: a factor, and the time that a pass takes at any width. Pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UserError
from pipeline.network.groups import Groups, Width
from pipeline.prune.channels import Price
from pipeline.run.records import LatencyTable
from pipeline.settings.pruning import Target

NS = 10**6  # in a millisecond: prices are whole nanoseconds
SHORTEST = 1e-6  # ms; stands for a time of 0 in divisions
Floats = NDArray[np.float64]


def price(groups: Groups, table: LatencyTable) -> Price:
    """The predicted time of a pass, in ns, by the kept units of each group."""
    milliseconds = predictor(groups, table)
    return lambda keep: round(NS * milliseconds(keep))


def predictor(groups: Groups, table: LatencyTable) -> Callable[[Mapping[str, int]], float]:
    """As `price`, in ms."""
    features = _Features(groups)
    parts = np.stack([features.at(each.keep) for each in table.timed])  # (networks, steps, 4)
    fitted = np.stack([
        _fit(parts[:, number], np.array([each.steps.get(step.name, 0.0) for each in table.timed]))
        for number, step in enumerate(groups.steps)
    ])  # fmt: skip
    fitted[:, 0] = 0.0  # the constants hold what reading the clock takes; whole passes have one of their own
    sums = (parts * fitted).sum((1, 2))
    times = np.array([each.ms for each in table.timed])
    scale, base = _fit(np.stack([sums, np.ones_like(sums)], 1), times)
    return lambda keep: float(scale * (features.at(keep) * fitted).sum() + base)


def error(groups: Groups, table: LatencyTable) -> float:
    """The largest error of the prediction among the networks that were measured, as a share of the time measured."""
    milliseconds = predictor(groups, table)
    return max(abs(milliseconds(each.keep) / max(each.ms, SHORTEST) - 1) for each in table.timed)


def aimed(target: Target, total: int) -> Target:
    """The target with target.latency_ms, where it is given, as a compression of the whole network's time (ns).

    Raises UserError for a time that the whole network needs no longer than.
    """
    if target.budget != "latency" or target.latency_ms is None:
        return target
    compression = total / (NS * target.latency_ms)
    if compression <= 1.0:
        raise UserError(
            f"target.latency_ms={target.latency_ms:g} removes nothing: by its table the whole network takes "
            f"{total / NS:.3g} ms; ask for less"
        )
    return target.model_copy(update={"compression": compression})


class _Features:
    """What the time of a step follows from: a constant, and the shares of its channels that it reads, makes, and both.

    A share is of the channels of the whole network.
    """

    def __init__(self, groups: Groups) -> None:
        self._sizes = groups.sizes
        self._reads = self._shares([step.reads for step in groups.steps])
        self._makes = self._shares([step.makes for step in groups.steps])

    def at(self, keep: Mapping[str, int]) -> Floats:
        """(steps, 4)."""
        kept = np.array([1.0, *(keep[name] / size for name, size in self._sizes.items())])
        read, made = self._reads @ kept, self._makes @ kept
        return np.stack([np.ones_like(read), read, made, read * made], 1)

    def _shares(self, widths: Sequence[Width]) -> Floats:
        """(steps, 1 + groups): which share of each width is fixed, and which is of each group."""
        rows = [[width.fixed, *(width.whole.get(name, 0) for name in self._sizes)] for width in widths]
        counts = np.array(rows, np.float64).reshape(len(rows), 1 + len(self._sizes))
        return counts / np.maximum(counts.sum(1, keepdims=True), 1.0)


def _fit(features: Floats, times: Floats) -> Floats:
    """The numbers, none below 0, by which features (rows, n) add up to times (rows,), with the least relative error."""
    from scipy.optimize import nnls  # here, since it takes a second to load

    scale = 1 / np.maximum(times, SHORTEST)
    found: Floats = nnls(features * scale[:, None], times * scale)[0]
    return found
