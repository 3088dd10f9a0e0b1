"""What a rank pays before its first batch, on a data set of 100,000 shards of 1,250 samples.

    python benchmarks/bench_manifest.py [SHARDS SAMPLES RANKS]

A manifest is made (the tars are not: their rows are made up), and opened by rank 0 and by the last of 1,024, each in a
process of its own: seconds and memory, beyond what the imports take, for opening, for placing an epoch, and for the
numbers and labels of the first batch. Goal: 1 s and 200 MB in all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.data import manifest, placement
from pipeline.data.columns import Described, Rows, Shard
from pipeline.data.split import Split
from pipeline.settings.config import parse_config

SHARDS, SAMPLES, RANKS = 100_000, 1_250, 1_024
SAMPLE_BYTES = 110 * 1024  # a JPEG of ImageNet with its headers
BATCH = 4  # of a rank


def main() -> None:
    shards, samples, ranks = (int(word) for word in sys.argv[1:4]) if sys.argv[1:] else (SHARDS, SAMPLES, RANKS)
    table = Table("rank", "open s", "place s", "batch s", "all s", "MB", title=f"{shards:,} shards of {samples:,}")
    with tempfile.TemporaryDirectory() as root:
        began = time.perf_counter()
        splits = {"train": [*made("train", shards, samples)], "test": [*made("test", 1, samples)]}
        splits["val"] = [*made("val", 1, samples)]
        manifest.save(root, [str(number) for number in range(1000)], 1000, "cls", splits, "made up")
        size = sum(os.path.getsize(os.path.join(root, name)) for name in os.listdir(root))
        Console(width=120).print(f"written in {time.perf_counter() - began:.0f} s: {size / 1e6:,.0f} MB")
        for rank in (0, ranks - 1):
            command = [sys.executable, __file__, "--rank", root, str(rank), str(ranks)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            seconds = found["seconds"]
            row = [f"{each:.2f}" for each in (*seconds, sum(seconds))]
            table.add_row(f"{rank:,} of {ranks:,}", *row, f"{found['megabytes']:.0f}")
    Console(width=120).print(table)


def made(split: str, shards: int, samples: int) -> Iterator[Described]:
    """So many shards with the same rows."""
    labels = np.random.default_rng(0).integers(0, 1000, samples)
    rows = Rows(np.arange(samples, dtype=np.int64) * SAMPLE_BYTES, labels, labels * 7919)
    for number in range(shards):
        yield Shard(f"{split}-{number:06d}.tar", samples, samples * SAMPLE_BYTES + 1024, f"{number:064x}"), rows


def rank_main(root: str, rank: int, ranks: int) -> None:
    """What one rank does, up to the numbers and labels of its first batch."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, marks = memory("VmRSS"), [time.perf_counter()]
    settings = {"source": "shards", "root": root, "channels": 3, "size": 224, "lanes": ranks}
    config = parse_config(
        {"name": "b", "data": settings, "dense": {"batch_size": ranks}, "retrain": {"batch_size": ranks}}
    )
    split = Split(config.data, root, manifest.load_manifest(root), "train")
    marks.append(time.perf_counter())
    own = placement.owned(rank, ranks, ranks)
    lanes = placement.epoch_lanes(split.counts, 0, 0, total=ranks, window=split.window, only=own)
    marks.append(time.perf_counter())
    numbers = np.concatenate([lane.samples[:BATCH] for lane in lanes])
    labels = split.labels_of(numbers)
    assert len(labels) == BATCH
    marks.append(time.perf_counter())
    print(json.dumps({"seconds": np.diff(marks).tolist(), "megabytes": memory("VmHWM") - before}))


def memory(field: str) -> float:
    """This process's memory in MB: VmRSS is what it has, VmHWM the most that it has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank_main(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
