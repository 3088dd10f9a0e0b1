"""Is a loss of accuracy real? Paired statistics on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr, stdtrit

Z95 = 1.959963984540054  # the 97.5% point of the normal distribution
MOST_TIMES = 1000.0  # as many samples as there are: more would hardly be had to decide a verdict


@dataclass(frozen=True)
class McNemar:
    """A paired comparison. Drops are fractions, accuracy(reference) - accuracy(pruned); positive is a loss."""

    only_reference_right: int
    only_pruned_right: int
    p_value: float
    drop: float
    drop_ci95: tuple[float, float]


def mcnemar(reference_right: NDArray[np.bool_], pruned_right: NDArray[np.bool_]) -> McNemar:
    """Compare two networks' answers to the same samples; both arrays are bool, shape (samples,).

    p_value: exact and two-sided, the discordant samples against Binomial(discordant, 1/2); 1 where there are none.
    drop_ci95: Tango's score interval (1998).
    """
    assert reference_right.dtype == pruned_right.dtype == np.bool_
    assert reference_right.shape == pruned_right.shape
    samples = len(reference_right)
    assert samples > 0
    lost = int(np.count_nonzero(reference_right & ~pruned_right))
    won = int(np.count_nonzero(pruned_right & ~reference_right))
    tail = float(bdtr(min(lost, won), lost + won, 0.5))
    return McNemar(lost, won, min(1.0, 2.0 * tail), (lost - won) / samples, tango(lost, won, samples))


def tango(lost: float, won: float, samples: float, z: float = Z95) -> tuple[float, float]:
    """Score interval for (lost - won) / samples from paired data (Tango 1998, Statistics in Medicine 17:891).

    It holds the differences that a score test would not reject. It stays valid with few discordant pairs, and with
    none, where it is +-z^2 / (samples + z^2).
    """
    drop = (lost - won) / samples

    def score(difference: float) -> float:
        """(observed - expected) / its standard deviation, if the true difference were `difference`; falling."""
        linear = (2 * samples - lost + won) * difference - lost - won
        root = math.sqrt(max(0.0, linear**2 + 8 * samples * won * difference * (1 - difference)))
        # The share of pairs won, most likely under `difference`: the upper root of a quadratic, without cancellation.
        if linear > 0:
            share = 2 * won * difference * (1 - difference) / (linear + root)
        else:
            share = (root - linear) / (4 * samples)
        variance = samples * (2 * share + difference * (1 - difference))
        distance = samples * (drop - difference)
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    def where(target: float, low: float, high: float) -> float:
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    lower = -1.0 if won == samples else where(z, -1.0, drop)
    upper = 1.0 if lost == samples else where(-z, drop, 1.0)
    return lower, upper


def guessing(right: int, samples: int, largest: float) -> bool:
    """Whether so many right answers are no better than always naming the largest class, a share of the samples.

    That is so where the lower end of Wilson's 95% interval does not lie above that share.
    """
    return wilson(right, samples)[0] <= largest


def verdict(low: float, high: float, margin: float) -> Literal["no loss", "loss", "undecided"]:
    """What the 95% interval (low, high) of the drop says, all as fractions.

    `no loss` if the upper bound is within the margin, even where the lower one is above 0: such a loss is real, but
    smaller than the margin that matters. Else `loss` if the lower bound is above 0; else `undecided`.
    """
    if high <= margin:
        return "no loss"
    return "loss" if low > 0 else "undecided"


def deciding(lost: int, won: int, samples: int, margin: float) -> int | None:
    """About how many samples would decide a verdict, if they were lost and won as often as in these `samples`.

    None where no number up to a thousand times as many would: the drop is too near to the margin.
    """

    def decided(times: float) -> bool:
        low, high = tango(times * lost, times * won, times * samples)
        return verdict(low, high, margin) != "undecided"

    few, many = 1.0, 1.0
    while not decided(many):
        if many >= MOST_TIMES:
            return None
        few, many = many, min(2 * many, MOST_TIMES)
    for _ in range(30):
        middle = (few + many) / 2
        few, many = (few, middle) if decided(middle) else (middle, many)
    return round(many * samples)


def paired_mean(differences: NDArray[np.float64], z: float = Z95) -> tuple[float, float]:
    """Student's interval for the mean of paired differences; (-inf, inf) for a single difference.

    z is the normal quantile of the wanted confidence; the t quantile of the same confidence is used.
    """
    count = len(differences)
    assert count > 0
    if count == 1:
        return -math.inf, math.inf
    mean = float(differences.mean())
    reach = float(stdtrit(count - 1, ndtr(z))) * float(differences.std(ddof=1)) / math.sqrt(count)
    return mean - reach, mean + reach


def wilson(k: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion, k of n (Wilson 1927); n > 0. z is the normal quantile of the confidence."""
    assert n > 0
    assert 0 <= k <= n
    z2 = z**2
    centre = (k + z2 / 2) / (n + z2)
    reach = z / (n + z2) * math.sqrt(k * (n - k) / n + z2 / 4)
    low = 0.0 if k == 0 else max(0.0, centre - reach)  # exactly 0 and 1 at the ends, whatever the rounding
    high = 1.0 if k == n else min(1.0, centre + reach)
    return low, high
