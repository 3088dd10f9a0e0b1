"""Random numbers depend on what they are for, and on nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base import seeding


def test_streams_are_distinct_and_repeatable() -> None:
    assert seeding.derive(0, "a", 1) == seeding.derive(0, "a", 1)
    assert len({seeding.derive(0, "a", 1), seeding.derive(0, "a", 2), seeding.derive(1, "a", 1)}) == 3
    assert seeding.derive(0, "a", "1") < 2**63


@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True))
def test_a_sample_draws_the_same_in_any_company(stream: int, samples: list[int]) -> None:
    together = seeding.uniform(stream, np.array(samples), 3)
    alone = np.concatenate([seeding.uniform(stream, np.array([sample]), 3) for sample in samples])
    assert np.array_equal(together, alone)
    assert together.min() >= 0.0
    assert together.max() < 1.0


def test_draws_are_uniform_and_uncorrelated() -> None:
    draws = seeding.uniform(seeding.derive(0, "test"), np.arange(20_000), 2)
    counts = np.histogram(draws[:, 0], bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom: beyond 50 is 1 in 10,000
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.03


@given(st.integers(0, 1000), st.lists(st.integers(0, 10**6), min_size=1, max_size=30, unique=True), st.integers(0, 30))
def test_the_shares_of_a_batch_add_up_to_its_digest(step: int, samples: list[int], cut: int) -> None:
    whole = seeding.order_digest(step, np.array(samples, dtype=np.int64))
    parts = [seeding.order_digest(step, np.array(part, dtype=np.int64)) for part in (samples[:cut], samples[cut:])]
    assert (sum(parts) - whole) % 2**64 == 0
    assert whole != seeding.order_digest(step + 1, np.array(samples, dtype=np.int64))
