"""The largest batch that fits: the search, and what is said where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.rounds import capacity
from pipeline.rounds.capacity import Fit, largest
from pipeline.settings.config import Config


@given(limit=st.integers(0, 5000), least=st.integers(1, 64), beyond=st.integers(0, 2000))
def test_it_finds_the_limit_in_few_tries(limit: int, least: int, beyond: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    most = least + beyond
    assert largest(fits, least, most) == (min(limit, most) if limit >= least else 0)
    assert len(tried) <= 2 * most.bit_length() + 1
    assert all(least <= number <= most for number in tried)
    assert len(tried) == len(set(tried))


def test_it_says_which_batch_size_that_is() -> None:
    said = Fit("dense", 384, 96, 256, 8).sentence
    assert said.startswith("dense.batch_size=256: 96 images of a worker fit into this GPU at a time")
    assert "dense.batch_size=384 is the largest" in said
    assert "not even 8 images" in Fit("dense", 0, 0, 256, 8).sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_nothing_to_find(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"^--device looks for .* device=auto is none here"):
        capacity.find(tiny(device="auto"), 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batch_fits_and_twice_of_it_does_not(tiny: Callable[..., Config]) -> None:
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        for fit in capacity.find(tiny(device="cuda", **{"data.size": 64}), 10):
            assert 0 < fit.images < capacity.MOST
            assert fit.batch_size % 8 == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
