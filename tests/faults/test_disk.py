"""A disk that is full in the middle of a run: one message that names it, and the run goes on when there is room.

A full disk of the cache ends nothing: what does not fit is read from its URL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from faults.moments import MOMENTS, OVER
from faults.runs import Line, Started, same_weights
from support import program
from tiny_run import NO_SCAN, TINY

from pipeline import storage
from pipeline.data import push, shards
from pipeline.data.cache import Cache, Entry
from pipeline.settings.config import parse_config

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


@pytest.fixture
def pushed(s3: str, tmp_path: Path) -> str:
    """The tiny run's shards on S3."""
    shards.build(parse_config(TINY).data.model_copy(update={"shard_samples": 200}), 0, str(tmp_path / "shards"))
    push.push(str(tmp_path / "shards"), f"{s3}/shards")
    return f"{s3}/shards"


def leave_room(folder: Path, bytes_: int) -> None:
    """Fill a disk but for so many bytes."""
    file = fill(folder)
    (folder / "rest").unlink()
    os.truncate(file, file.stat().st_size - bytes_)


def test_a_disk_of_the_cache_that_is_full(pushed: str, tiny_yaml: Path, disk: Path, line: Line) -> None:
    settings = [NO_SCAN, "prune.rounds=1", "data.source=shards", f"data.root={pushed}", "data.cache_bytes=0"]
    undisturbed = program("pipeline", "run", str(tiny_yaml), *settings, ray=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    largest = max(stat.bytes for name, stat in storage.stats(pushed).items() if name.endswith(".tar"))
    leave_room(disk, 2 * largest)
    started = time.monotonic()
    full = program(
        "pipeline", "run", str(tiny_yaml), *settings, f"data.cache_dir={disk / 'cache'}", "name=full", ray=False
    )
    lost = time.monotonic() - started
    assert full.returncode == 0, full.stderr
    assert f"data.cache_dir={disk / 'cache'}: its disk is full" in full.stdout + full.stderr
    kept = {path.suffix for path in (disk / "cache").iterdir()}
    assert kept == {".tar", ".lock", ""}  # some shards, and nothing half written
    assert same_weights(tiny_yaml.parent / "runs/tiny", tiny_yaml.parent / "runs/full")
    line("disk full in the cache", "identical", 0, lost)


def test_a_disk_of_the_cache_that_fills_while_a_shard_is_fetched(
    pushed: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_room(disk, 4096)
    name = next(name for name in storage.list_files(pushed) if name.endswith(".tar"))
    url = f"{pushed}/{name}"
    found = storage.stat(url)
    assert found is not None
    entry = Entry(url, found.version, found.bytes, storage.sha256(url))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))  # the moment before
    with pytest.warns(UserWarning, match="its disk is full"):
        assert Cache(str(disk), 10**9, [entry]).open(url, 0, None) is None
    assert not list(disk.glob("*.t*"))
