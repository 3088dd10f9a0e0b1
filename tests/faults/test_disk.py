"""A disk that is full in the middle of a run: one message that names it, and the run goes on when there is room."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.moments import MOMENTS, OVER
from faults.runs import Line, Started, same_weights
from support import program

pytestmark = pytest.mark.faults
# Slow enough to be met in the middle of a stage.
SLOW = ["prune.rounds=1", "scan.levels=[0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1]", "retrain.epochs=60", "scan.batch=1"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all room that is left."""
    file = folder / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={file}", "bs=64k"], capture_output=True, check=False)
    subprocess.run(["dd", "if=/dev/zero", f"of={folder / 'rest'}", "bs=1k"], capture_output=True, check=False)
    return file


@pytest.mark.parametrize("stage", ["scan", "rounds"])
def test_a_disk_that_fills_in_a_stage(stage: str, tiny_yaml: Path, disk: Path, line: Line) -> None:
    settings = SLOW[:3]
    undisturbed = program("pipeline", "run", str(tiny_yaml), *settings, ray=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    command = [sys.executable, "-m", "pipeline", "run", str(tiny_yaml), f"runs_dir={disk}", *settings]
    run, ready = Started(tiny_yaml.parent / "log.txt", command), MOMENTS[stage]
    try:
        run.wait(lambda: ready(disk / "tiny"))
        fill(disk)
        run.finish(code=2)
    finally:
        run.kill()
    assert not (disk / "tiny" / OVER[stage]).exists()
    errors = [text for text in run.output.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1, run.output
    assert "no space left to write" in errors[0]
    assert str(disk) in errors[0]
    assert "Traceback" not in run.output
    for name in ("filler", "rest"):
        (disk / name).unlink(missing_ok=True)
    mended = time.monotonic()
    again = program("pipeline", "run", str(tiny_yaml), f"runs_dir={disk}", *settings, ray=False)
    assert again.returncode == 0, again.stderr
    assert same_weights(tiny_yaml.parent / "runs/tiny", disk / "tiny")
    line(f"disk full in the {stage}", "stops cleanly", "<=7" if stage == "rounds" else 0, time.monotonic() - mended)
