"""What a scan of 1,000 layers x 10,000 levels writes while it goes on: real files, numbers made up."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import few_samples
import pytest
import scan_records
from faults.runs import Line
from support import written_bytes

from pipeline.run import journal
from pipeline.run.records import Figures, Finding, ScanOrigin
from pipeline.run.state import fingerprint
from pipeline.scan.known import LEVELS, known

LAYERS, OF_EACH = 1_000, 10_000
A_LEVEL = 400  # bytes at most
SECONDS = 0.0005  # of processor time at most for a level, on a busy machine too
ORIGIN = ScanOrigin("ab", "cd", {"seed": 0})


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_thousand_layers_at_ten_thousand_levels(tmp_path: Path, line: Line) -> None:
    here = few_samples.run_in(tmp_path / "run")
    # The same records for each layer: of the levels only what is written is of interest here.
    levels = [scan_records.level(1 - number / (OF_EACH + 1), rise=number / 3e4) for number in range(1, OF_EACH + 1)]
    halves, began = [], time.monotonic()
    with known(here, ORIGIN, "trials.json") as found:
        for half in range(2):
            bytes_before, seconds_before = written_bytes(), time.process_time()
            for layer in range(half * LAYERS // 2, (half + 1) * LAYERS // 2):
                for level in levels:
                    assert found.add(f"block{layer:03d}.conv.weight", level)
            halves.append((written_bytes() - bytes_before, time.process_time() - seconds_before))
        found.set_dense(Figures(0.9, 0.3, 100))
        assert found.count == LAYERS * OF_EACH
    took = time.monotonic() - began
    del found
    per_half = LAYERS * OF_EACH // 2
    assert halves[1][0] <= 1.01 * halves[0][0] < 1.01 * per_half * A_LEVEL
    assert halves[1][1] <= 2 * halves[0][1] < 2 * per_half * SECONDS  # the second half costs what the first did
    # A kill tears the last line, which is the dense network's figures: all levels are found.
    folder = ("scan", LEVELS, fingerprint(ORIGIN.to_json()))
    [file] = Path(here.path(*folder)).iterdir()
    os.truncate(file, file.stat().st_size - 5)
    seconds_before, counts = time.process_time(), dict[str, int]()
    for row in journal.read(here, Finding, *folder):
        assert row.tensor is not None
        counts[row.tensor] = counts.get(row.tensor, 0) + 1
    assert counts == {f"block{layer:03d}.conv.weight": OF_EACH for layer in range(LAYERS)}
    assert time.process_time() - seconds_before < LAYERS * OF_EACH * SECONDS
    shutil.rmtree(tmp_path / "run")  # 3 GB
    line("1,000 layers × 10,000 levels of bookkeeping", "continues", None, took)
