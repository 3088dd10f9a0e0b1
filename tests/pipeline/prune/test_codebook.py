"""k-means by hand, and what holds for any weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.prune import codebook


def test_two_centroids_by_hand() -> None:
    """From 0 and 10 the cut is at 5: {0, 1, 4} and {10}. Their means 5/3 and 10 cut at 5.8, which changes nothing."""
    centroids, places = codebook.share(np.array([10.0, 0.0, 4.0, 1.0]), 2)
    assert centroids.tolist() == [5 / 3, 10.0]
    assert places.tolist() == [1, 0, 0, 0]


def test_a_value_in_the_middle_goes_down_and_an_empty_centroid_goes() -> None:
    # from 0, 4, 8: cuts at 2 and 6; 2 is below the first, and between the cuts there is nothing
    centroids, places = codebook.share(np.array([0.0, 2.0, 0.0, 8.0, 7.0]), 3)
    assert centroids.tolist() == [2 / 3, 7.5]
    assert places.tolist() == [0, 0, 0, 1, 1]


def test_repeated_values_count_each_time() -> None:
    centroids, _ = codebook.share(np.array([0.0, 0.0, 0.0, 1.0, 9.0, 10.0]), 2)
    assert centroids.tolist() == [0.25, 9.5]


def test_as_few_values_as_centroids_stay_as_they_are() -> None:
    values = np.array([3.0, -1.0, 3.0])
    centroids, places = codebook.share(values, 2)
    assert centroids[places].tolist() == values.tolist()
    assert codebook.share(np.zeros(0), 4)[0].tolist() == []


finite = st.floats(-1e6, 1e6, width=32)


@given(st.lists(finite, min_size=1, max_size=200), st.integers(1, 40))
def test_each_value_has_its_nearest_centroid_and_each_centroid_is_the_mean_of_its_values(
    given_values: list[float], count: int
) -> None:
    values = np.array(given_values, np.float32)
    centroids, places = codebook.share(values, count)
    assert 1 <= len(centroids) <= count
    assert (np.diff(centroids) > 0).all()
    assert set(places.tolist()) == set(range(len(centroids)))
    reach = float(np.abs(values).max()) + 1
    distance = np.abs(values.astype(np.float64)[:, None] - centroids)
    assert (distance[np.arange(len(values)), places] <= distance.min(1) + 1e-9 * reach).all()
    means = [values.astype(np.float64)[places == place].mean() for place in range(len(centroids))]
    np.testing.assert_allclose(centroids, means, atol=1e-9 * reach)


@given(st.lists(finite, min_size=1, max_size=100), st.randoms())
def test_the_order_of_the_values_changes_no_bit(given_values: list[float], chance: object) -> None:
    values = np.array(given_values, np.float32)
    shuffled = np.array(given_values, np.float32)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert codebook.share(values, 4)[0].tobytes() == codebook.share(shuffled, 4)[0].tobytes()


def test_rounding_is_to_half_precision_where_that_holds_all() -> None:
    assert codebook.rounded(np.array([0.1, -0.0])).tolist() == [float(np.float16(0.1)), 0.0]
    assert not np.signbit(codebook.rounded(np.array([-0.0, 0.0]))).any()
    for other in (1e5, 1.01e-5, 1e-9, -1e-30):  # too large, and too small for 11 bits or for any
        assert codebook.rounded(np.array([0.1, other])).tolist() == np.array([0.1, other], np.float32).tolist()
    assert codebook.rounded(np.array([2.0**-20])).tolist() == [2.0**-20]  # small, and held as it is


def test_bits_by_name_before_pattern_before_kind() -> None:
    kinds = {"c.weight": "conv", "f.weight": "fc", "g.weight": "fc", "c.bias": None, "f.bias": None}
    assert codebook.bits_of({"conv": 8, "fc": 5}, kinds) == {"c.weight": 8, "f.weight": 5, "g.weight": 5}
    given = {"fc": 5, "*.bias": 4, "f.bias": 3, "g*": 2}
    assert codebook.bits_of(given, kinds) == {"f.weight": 5, "g.weight": 2, "c.bias": 4, "f.bias": 3}
    assert codebook.bits_of({"conv": 8, "attention": 6}, {"f.weight": "fc"}) == {}
    with pytest.raises(UserError, match=r"export.codebook_bits: 'h\*' matches no"):
        codebook.bits_of({"h*": 3}, kinds)
