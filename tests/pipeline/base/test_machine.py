"""What this machine is busy with: read from the system itself, and from a program that prints as nvidia-smi does."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from pipeline.base import machine

SMI = """#!/bin/sh
asked=index,name,utilization.gpu,memory.used,memory.total,power.draw,power.limit
[ "$*" = "--query-gpu=$asked --format=csv,noheader,nounits" ] || exit 1
echo "0, NVIDIA H200, 97, 1024, 4096, 350.5, 701.0"
echo "1, NVIDIA H200, [N/A], 0, 4096, [N/A], 701.0"
"""


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, so that no nvidia-smi of this machine is found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def program(folder: Path, text: str) -> None:
    (folder / "nvidia-smi").write_text(text)
    (folder / "nvidia-smi").chmod(0o755)


def test_a_reading_is_of_this_machine(bare: Path) -> None:
    meter = machine.Meter()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    found = meter.read()
    assert set(found) == {
        "cpu_utilization_percentage", "system_memory_usage_megabytes", "system_memory_usage_percentage",
        "disk_usage_percentage", "disk_usage_megabytes", "disk_available_megabytes", "network_receive_megabytes",
        "network_transmit_megabytes",
    }  # fmt: skip
    assert 0 < found["cpu_utilization_percentage"] <= 100
    total = found["system_memory_usage_megabytes"] / (found["system_memory_usage_percentage"] / 100)
    assert total == pytest.approx(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6, rel=0.05)
    assert found["network_receive_megabytes"] >= 0
    assert machine.node() == socket.gethostname()
    assert machine.parts().startswith(f"{os.cpu_count()} × ")


def test_gpus_are_told_by_number(bare: Path) -> None:
    program(bare, SMI)
    found = {name: value for name, value in machine.Meter().read().items() if name.startswith("gpu_")}
    assert found == {
        "gpu_0_utilization_percentage": 97.0, "gpu_0_memory_usage_megabytes": 1073.7,
        "gpu_0_memory_usage_percentage": 25.0, "gpu_0_power_usage_watts": 350.5, "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 0.0, "gpu_1_memory_usage_percentage": 0.0,
    }  # fmt: skip
    assert machine.parts().endswith(", 2 × NVIDIA H200")


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho NVIDIA-SMI has failed\n", "no program\n"])
def test_a_driver_that_does_not_work_is_left_out(bare: Path, text: str) -> None:
    program(bare, text)
    assert not [name for name in machine.Meter().read() if name.startswith("gpu_")]


def test_a_driver_that_hangs_is_given_up(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(machine, "PATIENCE_S", 0.2)
    began = time.monotonic()
    assert not [name for name in machine.Meter().read() if name.startswith("gpu_")]
    assert time.monotonic() - began < 20
