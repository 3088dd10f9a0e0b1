"""What a density costs: for each tensor, the predicted rise of the loss against the weights that it keeps.

The scan prunes one tensor at a time. When all are pruned, the rises do not simply add up, since one layer's error makes
the next one's weigh more. So a tensor's damage is its rise to the power p. Damages add up, and the rise of all tensors
together is their sum to the power 1/p. With p = 1 the rises add up, as of independent errors. With p = 1/2 the errors
themselves add up, as if all had one direction. Which p holds depends on the network and on how much is pruned, so the
scan measures it (`pipeline.scan.together`). Pure functions of what scan.json holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.stats import Z95
from pipeline.run.records import Difference, Level, Scan, TogetherRow

POWERS = (0.3, 0.5, 0.7, 0.85, 1.0)  # the powers that are tried
USUAL_POWER = 0.85  # where none was measured; as on LeNet-300-100, see configs/LOG.md
TRUSTED = 0.5  # share of the rise at chance; only levels below this share are extrapolated from
STEEPEST, FLATTEST, USUAL = 6.0, 1.0, 2.0  # bounds of the exponent by which a rise grows below the trusted levels
CLEAR = 3  # the last trusted levels that the exponent is fitted to
POINTS = 400  # points of a curve
WORST = 1e6  # nats; stands for a loss that is not finite
FINEST = 1e-4  # nats; a level with a narrower interval changes no answer
SPREAD = 1e-5  # damage; spreads a budget over tensors in which the scan finds no damage

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The predicted damage of a tensor against its number of kept weights: two arrays of shape (points,).

    `kept` rises from 0 to all weights; `damage` falls to 0, and is linear between the points. Damages are rises to some
    power. The tensors' damages add up, and `total_rise` turns the sum into nats.
    """

    kept: NDArray[np.int64]
    damage: Floats

    @property
    def weights(self) -> int:
        """The weights of the tensor."""
        return int(self.kept[-1])

    def at(self, kept: Any) -> Any:
        """The damage for a number of kept weights, or for an array of such numbers; same shape."""
        return np.interp(kept, self.kept, self.damage)


def curves(scan: Scan, classes: int, power: float = USUAL_POWER) -> dict[str, Curve]:
    """The curve of every tensor in a scan of the dense network, by name."""
    room = chance_rise(scan, classes)
    return {tensor.name: curve(tensor.levels, tensor.weights, room, power) for tensor in scan.tensors}


def total_rise(damage: float, power: float) -> float:
    """The predicted rise of the loss (nats) where the tensors' damages, rises to `power`, add up to this."""
    return float(damage ** (1 / power))


def best_together(rows: Iterable[TogetherRow]) -> dict[float, TogetherRow]:
    """For each density at which all tensors were pruned together, the row with the smallest rise of the loss.

    Of equal rows, the one whose power is nearest to USUAL_POWER.
    """
    by_density: dict[float, list[TogetherRow]] = {}
    for row in rows:
        by_density.setdefault(row.density, []).append(row)
    return {
        density: min(found, key=lambda row: (finite(row.rise), abs(row.power - USUAL_POWER)))
        for density, found in by_density.items()
    }


def rising(rows: Iterable[TogetherRow]) -> list[tuple[TogetherRow, float, float]]:
    """The rows with a finite rise, each with its rise made monotone, and the standard error of that one's logarithm.

    Less density never means less rise: where a row says so, it is by chance, and isotonic regression evens it out.
    """
    known = sorted((row for row in rows if math.isfinite(row.rise)), key=lambda row: -row.density)
    if not known:
        return []
    rises, reach = measured(known)
    above = np.log1p(reach / np.maximum(rises, FINEST)) / Z95
    return [(row, float(rise), float(error)) for row, rise, error in zip(known, rises, above, strict=True)]


def interval(row: Difference) -> tuple[float, float]:
    """The ends of the measured interval of a rise (nats); from one sample alone, a nat or the rise to either side."""
    if row.rise_low is not None and row.rise_high is not None and math.isfinite(row.rise_high - row.rise_low):
        return row.rise_low, row.rise_high
    reach = max(1.0, abs(finite(row.rise)))
    return row.rise - reach, row.rise + reach


def finite(rise: float) -> float:
    """A rise (nats), or WORST where it is not a number or infinite."""
    return rise if math.isfinite(rise) else WORST


def chance_rise(scan: Scan, classes: int) -> float:
    """The rise of the loss (nats) from the dense network to guessing among `classes` classes."""
    return max(FINEST, math.log(classes) - scan.dense.loss)


def curve(levels: Sequence[Level], weights: int, room: float, power: float = USUAL_POWER) -> Curve:
    """A tensor's curve from its levels; `room` is the rise at which the network guesses.

    Rises are made monotone by isotonic regression, weighted by their intervals, and joined by a monotone cubic in log
    density (Fritsch and Carlson 1980), from none at density 1 on. Near chance, losses no longer tell densities apart.
    So below the last level that is nearer to the dense network than to chance (TRUSTED), the rise is extrapolated by a
    power of the density. Otherwise pruning the rest of a nearly destroyed tensor would look free.
    """
    known = sorted((level for level in levels if level.density < 1.0), key=lambda level: -level.density)
    logs = np.log([level.density for level in known])
    apart = np.diff(logs, prepend=0.0) < 0  # densities that differ in their last bits may have one logarithm
    logs, known = logs[apart], [level for level, distinct in zip(known, apart, strict=True) if distinct]
    rises, reach = measured(known)
    trusted = max(1, int(np.searchsorted(rises, TRUSTED * room, side="right"))) if known else 0
    logs, rises, reach = logs[:trusted], rises[:trusted], reach[:trusted]
    kept = np.unique(np.concatenate([[0], np.geomspace(1, weights, POINTS).round(), (np.exp(logs) * weights).round()]))
    density = np.log(np.maximum(kept, 0.5) / weights)  # half a weight stands for none: log(0) is not finite
    damage = SPREAD * np.expm1(-density)
    if trusted:
        from scipy.interpolate import PchipInterpolator  # here, since it takes a second to load

        joined = PchipInterpolator(np.append(0.0, -logs), np.append(0.0, rises**power))
        damage += joined(np.minimum(-density, -logs[-1]))
        last = max(rises[-1], reach[-1])  # the uncertainty of the rise is extrapolated too
        beyond = np.maximum(0.0, logs[-1] - density)
        damage += last**power * np.expm1(power * exponent(logs, rises, reach) * beyond)
    return Curve(kept.astype(np.int64), np.minimum.accumulate(damage))


def measured(levels: Sequence[Difference]) -> tuple[Floats, Floats]:
    """The rises of levels of falling density, made monotone and at least 0, and the half-widths of their intervals."""
    rises = np.array([finite(level.rise) for level in levels])
    ends = [(level.rise_low, level.rise_high) for level in levels]
    reach = np.array([math.inf if low is None or high is None else (high - low) / 2 for low, high in ends])
    reach = np.maximum(np.where(np.isfinite(reach), reach, np.maximum(1.0, rises)), FINEST)
    if len(rises):
        from scipy.optimize import isotonic_regression

        rises = np.maximum(isotonic_regression(rises, weights=reach**-2.0).x, 0.0)
    return rises, reach


def exponent(logs: Floats, rises: Floats, reach: Floats) -> float:
    """The power of 1 / density by which a rise grows, from the last trusted levels that show a clear rise."""
    clear = np.flatnonzero(rises > reach)[-CLEAR:]
    if len(clear) < 2:
        return USUAL
    x, y = -logs[clear], np.log(rises[clear])
    slope = float(np.polyfit(x, y, 1)[0])
    return min(max(slope, FLATTEST), STEEPEST)
