"""What the paper's ImageNet networks cost at full width: seconds of each stage and peak memory, on made-up images.

    python benchmarks/bench_imagenet.py [alexnet-paper vgg16-paper]

Each config runs once from ImageNet's own file layout to the report, in a process of its own: four classes of noise,
two updates in dense training and in one round, two levels of the scan. Accuracy means nothing here. VGG-16 takes
6 GB and five minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
TRAIN, VAL = 12, 4  # images of a class
STAGES = ("shards", "dense", "scan", "rounds", "final")
SETTINGS = (
    "data.classes=1000", "data.val_fraction=0.25", "data.lanes=4", "data.eval_batch=8", "data.shard_samples=16",
    "data.decode_threads=1", "dense.epochs=1", "dense.steps=2", "dense.batch_size=8", "retrain.epochs=1",
    "retrain.steps=3", "retrain.batch_size=8", "scan.levels=[0.5,0.1]", "scan.samples=8", "scan.delta=0.5",
    "prune.allocation=paper", "prune.rounds=1", "prune.dense_control=false", "tracking.enabled=false",
)  # fmt: skip


def main() -> None:
    names = sys.argv[1:] or ["alexnet-paper", "vgg16-paper"]
    table = Table("network", *STAGES, "all", "peak GB", "kept", "packed MB", title="seconds a stage")
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "ilsvrc")
        for name in names:
            table.add_row(*measure(name, Path(folder)))
    Console(width=140).print(table)


def make_images(root: Path) -> None:
    """train/<wnid>/* and val/<wnid>/* of noise that is a little larger than the networks' input."""
    generator = np.random.default_rng(0)
    for wnid in WNIDS:
        for part, count in (("train", TRAIN), ("val", VAL)):
            (root / part / wnid).mkdir(parents=True)
            for number in range(count):
                small = Image.fromarray(generator.integers(0, 256, (32, 40, 3)).astype(np.uint8))
                small.resize((375, 300)).save(root / part / wnid / f"{wnid}_{number}.JPEG", "JPEG", quality=90)


def measure(name: str, folder: Path) -> list[str]:
    """One run of a config; its row of the table. Exits where the run fails."""
    arguments = [f"data.root={folder / 'ilsvrc'}", f"runs_dir={folder}", f"name={name}", *SETTINGS]
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / f"{name}.yaml"), *arguments]
    started = time.monotonic()
    with (folder / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # of this one process, not the largest of all so far
        seconds = time.monotonic() - started
        if status:
            log.seek(0)
            sys.exit(log.read()[-3000:])
    result = json.loads((folder / name / "result.json").read_text())
    return [
        name,
        *(f"{result['seconds'][stage]:.1f}" for stage in STAGES),
        f"{seconds:.1f}",
        f"{usage.ru_maxrss / 2**20:.1f}",
        f"{result['weights_kept']:,} of {result['weights_total']:,}",
        f"{result['bytes']['packed'] / 1e6:.0f}" if result["bytes"]["packed"] else "-",
    ]


if __name__ == "__main__":
    main()
