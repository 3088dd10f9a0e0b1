"""secateur packed: a released file to safetensors and back, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from pipeline.base.errors import UserError
from pipeline.cli.packed_cli import packed_app

BOOK = np.array([0, 3, 1, 2, *[0] * 12], "<f4")
# weights 0 and 17 of 20: code 3, then a filler over 16 zeros, code 1
FILE = struct.pack("<I", 3) + BOOK.tobytes() + struct.pack("<ff", 5, 6) + bytes([0x03, 0x01, 0xF0, 0x00])


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    (tmp_path / "net.bin").write_bytes(FILE)
    (tmp_path / "layers.yaml").write_text("- {name: fc1, shape: [2, 10]}\n")
    return tmp_path / "layers.yaml"


def run(*args: str | Path) -> str:
    done = CliRunner().invoke(packed_app, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_there_and_back(tmp_path: Path, layers: Path) -> None:
    middle = tmp_path / "net.safetensors"
    assert run("read-released", tmp_path / "net.bin", layers, middle) == "fc1: 2 of 20 weights, 1 fillers\n"
    assert load_file(middle)["fc1.weight"].reshape(-1)[[0, 17]].tolist() == [2, 3]
    assert run("write-released", middle, layers, tmp_path / "again.bin").endswith(f"again.bin: {len(FILE)} bytes\n")
    assert (tmp_path / "again.bin").read_bytes() == FILE


def test_quantised_weights_alone(tmp_path: Path, layers: Path) -> None:
    weight = np.zeros((2, 10), np.float32)
    weight[0, 0] = 2
    save_file({"fc1.weight": weight, "fc1.bias": np.zeros(2, np.float32)}, tmp_path / "in.safetensors")
    run("write-released", tmp_path / "in.safetensors", layers, tmp_path / "out.bin")
    run("read-released", tmp_path / "out.bin", layers, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["fc1.weight"].tolist() == weight.tolist()


def test_what_is_no_safetensors_is_refused(tmp_path: Path, layers: Path) -> None:
    for source, message in ((layers, "is no safetensors file"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=message):
            run("write-released", source, layers, tmp_path / "out.bin")
