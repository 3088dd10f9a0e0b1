"""Which levels the scan tries next, and when one needs no more samples. Pure numbers: no network, no data.

Racing looks at a level after fixed numbers of samples and stops it at the first look that decides it. Ordinary 95%
intervals would not hold at a look that the data chose. So every look has an interval of confidence 1 - 0.05/looks
(Bonferroni over the looks). With 95% certainty the intervals of all looks hold at once, and so does the one at which
the level stopped. These are repeated confidence intervals (Jennison and Turnbull 1989, J. R. Stat. Soc. B 51:305) with
the simplest, slightly wide, boundary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from scipy.special import ndtri

from pipeline.base.stats import Z95
from pipeline.run.records import Level
from pipeline.settings.pruning import Scan

LOOKS = 5  # at most; one more look makes every interval a little wider
FIRST = 50  # samples at the first look
CLOSEST = 1.05  # neighbouring levels whose densities differ by less than this factor are not told apart
ERROR = 0.05  # chance that a level's interval misses


def looks(samples: int, racing: bool) -> list[int]:
    """The numbers of samples after which levels are looked at, rising to all samples. Without racing there is one look.

    With racing they grow by a constant factor from FIRST on, as in 50, 100, 200, 400, 800.
    """
    if not racing or samples <= FIRST:
        return [samples]
    factor = (samples / FIRST) ** (1 / (LOOKS - 1))
    return sorted({round(FIRST * factor**step) for step in range(LOOKS)})


def critical(count: int) -> float:
    """The two-sided normal quantile of each of `count` looks: 1.96 for one, 2.58 for five."""
    return Z95 if count == 1 else float(ndtri(1 - ERROR / (2 * count)))


def decided(low: float, high: float, dense_top1: float, scan: Scan) -> bool:
    """Whether a level needs no more samples: the interval (low, high) of its drop is narrow enough, or beyond what
    matters.
    """
    if scan.interval is None:
        return False
    return (high - low) / 2 <= scan.interval or low > scan.hopeless * dense_top1


def next_levels(known: Sequence[Level], scan: Scan, weights: int) -> list[float]:
    """The densities to measure next, falling, of a tensor with so many `weights`; none when its curve is done.

    grid: those of scan.levels that are missing. adaptive: first the largest, the middle and the smallest of
    scan.levels; then, until scan.max_levels, between neighbours (the dense network being the first) whose drops differ
    by more than scan.tolerance, the widest gap first, at the geometric mean of their densities.

    adaptive chooses several levels at once, and a scan may stop when some of them are measured. So the choices are made
    again from the first on, each from the levels of the choices before it alone: the curve is the one of a scan that
    never stopped.
    """
    if not weights:
        return []
    measured = {level.density: level.drop for level in known}
    if scan.mode == "grid":
        return [density for density in scan.levels if density not in measured]
    chosen = [*dict.fromkeys((scan.levels[0], scan.levels[len(scan.levels) // 2], scan.levels[-1]))]
    curve: dict[float, float] = {}
    while chosen:
        missing = [density for density in chosen if density not in measured]
        if missing:
            return missing
        curve |= {density: measured[density] for density in chosen}
        chosen = _between(curve, scan, weights)
    return []


def _between(curve: Mapping[float, float], scan: Scan, weights: int) -> list[float]:
    """The densities that mode adaptive adds to a curve of drops by density; falling."""
    gaps = []
    for (upper, before), (lower, after) in itertools.pairwise([(1.0, 0.0), *sorted(curve.items(), reverse=True)]):
        middle = float(f"{math.sqrt(upper * lower):.3g}")
        apart = upper / lower >= CLOSEST and kept(upper, weights) > kept(middle, weights) > kept(lower, weights)
        if abs(after - before) > scan.tolerance and apart:
            gaps.append((abs(after - before), middle))
    room = max(0, scan.max_levels - len(curve))
    return sorted((middle for _, middle in sorted(gaps, reverse=True)[:room]), reverse=True)


def kept(density: float, weights: int) -> int:
    """How many of a tensor's `weights` a level keeps: at least one."""
    return max(1, round(density * weights))
