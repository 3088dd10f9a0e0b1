"""A shard with any harm is named, or what it holds is read rightly; nothing in it is run, in no memory or time."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.limits import judged
from faults.shard_mutants import whole_shards

SEED = 4
COUNT = 200
SAMPLE = range(10)  # those of the ordinary suite


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutants")
    whole_shards(root)
    return root


def test_a_sample_of_mutated_shards(folder: Path) -> None:
    outcomes = judged("shard_mutants", SEED, SAMPLE, folder)
    assert len(outcomes) > 3


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_mutated_shards(folder: Path) -> None:
    outcomes = judged("shard_mutants", SEED, range(SAMPLE.stop, COUNT), folder)
    assert len(outcomes) > 8
