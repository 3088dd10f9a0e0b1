"""Random numbers as pure functions of names and counters.

Nothing in secateur carries a random state from one step to the next: every draw is a hash of its purpose (seed, name,
epoch, step, sample). A run that is resumed, or spread over other workers, draws the same numbers, and no random state
needs to be saved.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` under `seed`; distinct names are independent."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the stream called `names`."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), elementwise."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniform(stream: int, samples: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), shape (len(samples), draws): row i depends on (stream, samples[i]) alone."""
    with np.errstate(over="ignore"):
        rows = _mix(samples.astype(np.uint64) * _GOLDEN + np.uint64(stream))
        columns = (np.arange(1, draws + 1, dtype=np.uint64)) * _GOLDEN
        mixed = _mix(rows[:, None] + columns[None, :])
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order_digest(step: int, samples: NDArray[np.int64]) -> int:
    """A signed 64-bit number for "these samples at this step".

    The digests of a batch's shares add up, modulo 2^64, to the digest of the whole batch. So workers digest their own
    shares, and the sum tells whether any number of workers saw the same samples in the same steps.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(samples.astype(np.uint64) * _GOLDEN + np.uint64(derive(step, "order")))
        return int(mixed.sum(dtype=np.uint64).astype(np.int64))
