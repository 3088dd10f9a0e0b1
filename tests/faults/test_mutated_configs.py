"""A config with any mistake gives a valid result or one message: no traceback, no hang, no memory without bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.config_mutants import tiny_data
from faults.limits import judged

SEED = 4
COUNT = 510
SAMPLE = range(10)  # those of the ordinary suite


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutants")
    (root / "data").mkdir()
    tiny_data(root / "data")
    return root


def test_a_sample_of_mutated_configs(folder: Path) -> None:
    outcomes = judged("config_mutants", SEED, SAMPLE, folder)
    assert outcomes["refused"] > len(SAMPLE) // 4
    assert outcomes["ran"] > 0


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(SAMPLE.stop, COUNT, 100))
def test_mutated_configs(first: int, folder: Path) -> None:
    outcomes = judged("config_mutants", SEED, range(first, min(first + 100, COUNT)), folder)
    assert outcomes["refused"] > 10
    assert outcomes["ran"] > 0
