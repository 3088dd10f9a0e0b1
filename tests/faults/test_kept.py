"""The faults that every `make test` makes, too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from faults.runs import Line, same_weights
from support import program


def test_a_full_disk_is_one_message_and_the_run_goes_on_when_there_is_room(
    tiny_yaml: Path, tmp_path: Path, line: Line
) -> None:
    """A real small file system; the dense checkpoint does not fit."""
    undisturbed = program("pipeline", "run", str(tiny_yaml), ray=False)
    assert undisturbed.returncode == 0, undisturbed.stderr
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        full = program("pipeline", "run", str(tiny_yaml), f"runs_dir={disk}", ray=False)
        assert full.returncode == 2, full.stdout + full.stderr
        errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, full.stderr
        assert str(disk) in errors[0]
        assert "free space" in errors[0]
        assert "Traceback" not in full.stderr
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        again = program("pipeline", "run", str(tiny_yaml), f"runs_dir={disk}", ray=False)
        assert again.returncode == 0, again.stderr
        assert same_weights(tiny_yaml.parent / "runs/tiny", disk / "tiny")
        line("disk full", "stops cleanly")
    finally:
        subprocess.run(["umount", disk], check=True)
