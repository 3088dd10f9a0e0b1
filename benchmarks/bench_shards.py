"""`shards build` of 6,000 photographs with one and with two processes, then killed with SIGKILL and begun again.

    SECATEUR_DATA=... python benchmarks/bench_shards.py [IMAGES]

The 125 full-size JPEGs of ImageNet are repeated, each copy a file of its own. They are decoded, shrunk to 320 and
written as JPEG again. Each way is run twice, in turns, and the faster counts. The bytes of all shards must be equal.
How long ImageNet takes on 64 cores is worked out from images a second and core.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_images import read
from rich.console import Console
from rich.table import Table

IMAGES, IMAGENET, CORES = 6_000, 1_281_167, 64
ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
name: shards
data: {source: folder, channels: 3, resize: 256, size: 224, shrink: 320, mean: [0.5], std: [0.25], shard_samples: 250}
model: {factory: torchvision.models.squeezenet1_1}
"""


def main() -> None:
    number = int(sys.argv[1]) if sys.argv[1:] else IMAGES
    tar = Path(os.environ.get("SECATEUR_DATA", ""), "imagenet-sample-125.tar")
    if not tar.is_file():
        sys.exit("imagenet-sample-125.tar is not here: set SECATEUR_DATA to the folder of real data")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(read(tar), folder / "images", number)
        (folder / "shards.yaml").write_text(CONFIG)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        made: set[str] = set()
        for _ in range(2):
            for workers, found in seconds.items():
                began = time.perf_counter()
                subprocess.run(build(folder, workers), cwd=ROOT, check=True, capture_output=True)
                found.append(time.perf_counter() - began)
                made.add(digest(folder / "out"))
                shutil.rmtree(folder / "out")
        resumed = killed(folder, min(seconds[2]))
        made.add(digest(folder / "out"))
    one, two = (min(found) for found in seconds.values())
    table = Table("", "seconds", "images/s", "x one process", title=f"{number:,} images")
    table.add_row("one process", f"{one:.1f}", f"{number / one:.0f}", "1.00")
    table.add_row("two processes", f"{two:.1f}", f"{number / two:.0f}", f"{one / two:.2f}")
    table.add_row("two, killed half-way: the rest", f"{resumed:.1f}", "", "")
    Console(width=100).print(table)
    print("bytes of all builds: " + ("equal" if len(made) == 1 else f"{len(made)} DIFFERENT ones"))
    hours = IMAGENET / (number / two / 2 * CORES) / 3600
    print(f"ImageNet's {IMAGENET:,} training images on {CORES} such cores: {hours:.2f} hours")


def write(files: list[bytes], root: Path, number: int) -> None:
    """Train images of ten classes, and a test image of each."""
    for index in range(number):
        target = root / ("train" if index >= 10 else "test") / f"class-{index % 10}" / f"{index:06d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files[index % len(files)])


def build(folder: Path, workers: int) -> list[str]:
    """The command."""
    program = [sys.executable, "-m", "cluster", "shards", "build", str(folder / "shards.yaml"), str(folder / "out")]
    return [*program, f"data.root={folder / 'images'}", "--workers", str(workers)]


def digest(folder: Path) -> str:
    """Of the names and bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(path.name.encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def killed(folder: Path, whole: float) -> float:
    """SIGKILL to a build and its processes half-way; the seconds of the command that goes on."""
    process = subprocess.Popen(
        build(folder, 2), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(whole / 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    began = time.perf_counter()
    subprocess.run(build(folder, 2), cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
