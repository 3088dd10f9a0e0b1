"""Shared values: the kept weights of a tensor take few values, by k-means (Han et al. 2016, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.prune import limits

KINDS = ("conv", "fc", "attention")
HALF = 2.0**-11  # the largest relative error of half precision, where its exponent reaches
STEPS = 1000  # of k-means at the most; it ends where no value changes its centroid, usually long before
Values = NDArray[np.float64]
Places = NDArray[np.uint8]


def bits_of(setting: Mapping[str, int], kinds: Mapping[str, str | None]) -> dict[str, int]:
    """Bits of each tensor's codebook: {tensor: bits}. `kinds` has all tensors, and None for one that is never pruned.

    A name or a pattern goes before the kind of a prunable tensor, conv, fc or attention. Raises UserError for a pattern
    that matches no tensor.
    """
    by_kind = {name: kind for name, kind in kinds.items() if kind in setting}
    found = {name: setting[str(kind)] for name, kind in by_kind.items()}
    patterns = {pattern: bits for pattern, bits in setting.items() if pattern not in KINDS}
    return found | {name: int(bits) for name, bits in limits.by_name(patterns, kinds, "export.codebook_bits").items()}


def share(values: NDArray[np.floating], count: int) -> tuple[Values, Places]:
    """At most `count` centroids for values, (n,) and finite, rising; and the place of each value's centroid.

    k-means from centroids spread evenly from the smallest to the largest value, until nothing changes. The same values
    give the same bits. A centroid without values goes. Where no more than `count` values differ, each is its own
    centroid. 1 <= count <= 256.
    """
    assert 1 <= count <= 256
    assert np.isfinite(values).all()
    if not len(values):
        return np.zeros(0), np.zeros(0, np.uint8)
    distinct, places = np.unique(values.astype(np.float64) + 0.0, return_inverse=True)  # no -0.0
    if len(distinct) <= count:
        return distinct, places.astype(np.uint8)
    often = np.bincount(places)
    ends = np.concatenate([[0], np.cumsum(often)])
    sums = np.concatenate([[0.0], np.cumsum(distinct * often)])
    centroids = np.linspace(distinct[0], distinct[-1], count)
    cuts = np.zeros(0, np.int64)
    for _ in range(STEPS):
        middles = (centroids[:-1] + centroids[1:]) / 2
        now = np.concatenate([[0], np.searchsorted(distinct, middles, "right"), [len(distinct)]])
        if np.array_equal(now, cuts):
            break
        cuts = now
        sizes = ends[cuts[1:]] - ends[cuts[:-1]]
        means = (sums[cuts[1:]] - sums[cuts[:-1]]) / np.maximum(sizes, 1)
        centroids = np.where(sizes > 0, means, centroids)  # an empty one stays where it is
    used = np.diff(cuts) > 0
    centroid = np.repeat(np.cumsum(used) - 1, np.diff(cuts))
    return centroids[used], centroid[places].astype(np.uint8)


def rounded(centroids: NDArray[np.floating]) -> NDArray[np.float32]:
    """Centroids rounded to half precision, which halves a codebook's bytes; in float32 where that does not hold one.

    0 is +0.0. The rounding, 11 bits of mantissa, is far below the distance of centroids. Numbers too large for half
    precision would be infinite, and those below 6e-5 would lose bits, or become 0.
    """
    exact = centroids.astype(np.float32)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16).astype(np.float32)
    held = np.abs(half.astype(np.float64) - exact) <= HALF * np.abs(exact.astype(np.float64))
    return (half if held.all() else exact) + np.float32(0.0)
