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


@given(limit=st.integers(0, 5000), unit=st.integers(1, 64), most=st.integers(1, 2000))
def test_it_finds_the_limit_in_few_tries(limit: int, unit: int, most: int) -> None:
    tried: list[int] = []

    def fits(images: int) -> bool:
        tried.append(images)
        return images <= limit

    assert largest(fits, unit, most) == min(limit, most) // unit * unit
    assert len(tried) <= 2 * (most // unit).bit_length() + 1
    assert all(0 < images <= most and images % unit == 0 for images in tried)
    assert len(tried) == len(set(tried))


def test_it_says_which_batch_size_that_is() -> None:
    said = Fit("dense", 96, 384, 256).sentence
    assert said.startswith("dense.batch_size=256: 96 images of a worker fit into this GPU at a time")
    assert "dense.batch_size=384 is the largest" in said
    assert "not one image fits" in Fit("dense", 0, 0, 256).sentence


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
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
