"""What a run costs beyond its arithmetic: the demo, under Ray and tracked by MLflow.

    python benchmarks/bench_overhead.py

Arithmetic is the time within epochs (steps and their evaluation) and the scan as it is in one process without Ray.
All else is overhead: the start of Python, Ray and the workers, shards, checkpoints, pruning, MLflow, the report.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.run import contents
from pipeline.run.records import Epoch

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    table = Table("what", "seconds", "goal")
    table.add_row("secateur --help: processor time, median of 5", f"{statistics.median(helped()):.2f}", "0.4")
    with tempfile.TemporaryDirectory() as folder:
        first, again = demo("cluster", f"{folder}/ray"), demo("cluster", f"{folder}/ray")
        demo("pipeline", f"{folder}/alone", "tracking.enabled=false")
        ray, alone = (contents.read(f"{folder}/{name}/demo") for name in ("ray", "alone"))
    assert ray.result
    assert alone.result
    assert ray.scan
    assert ray.dense
    assert ray.control
    trained = [ray.dense.history, ray.control.history, *(metrics.history for metrics in ray.finished_rounds)]
    arithmetic = sum(map(within, trained)) + (alone.result.seconds.scan or 0)
    trials = ((ray.result.seconds.scan or 0) - (alone.result.seconds.scan or 0)) / len(ray.scan.tensors)
    rounds = statistics.median(metrics.seconds - within(metrics.history) for metrics in ray.finished_rounds)
    table.add_row("the demo", f"{first:.1f}", "")
    table.add_row("of that its arithmetic", f"{arithmetic:.1f}", "")
    table.add_row("beyond it", f"{first - arithmetic:.1f}", "25")
    table.add_row("the demo again, when it is finished", f"{again:.1f}", "8")
    table.add_row("a trial of the scan, beyond its arithmetic", f"{trials:.2f}", "0.1")
    table.add_row("a round beyond its epochs, median", f"{rounds:.2f}", "0.5")
    Console(width=120).print(table)


def helped() -> Iterable[float]:
    """Processor seconds of each of five starts of the program."""
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "cluster", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        yield after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def demo(package: str, runs: str, *settings: str) -> float:
    """Seconds of a whole command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", package, "run", "configs/demo.yaml", f"runs_dir={runs}", *settings]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - began


def within(history: Iterable[Epoch]) -> float:
    """Seconds of all epochs."""
    return sum(epoch.seconds for epoch in history)


if __name__ == "__main__":
    main()
