"""When a run is in the middle of a stage, as its folder and its process tell."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.runs import newest_step

from pipeline.scan.known import LEVELS, TOGETHER


def has_threads_of_ray(run: Path) -> bool:
    """Whether the driver has Ray's threads: it has met the raylet, and is within ray.init or just after it."""
    driver = Path("/proc", str(json.loads((run / "lease.json").read_text())["pid"]), "task")
    for name in driver.glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            if name.read_text().strip() == "worker.io":
                return True
    return False


def measured(run: Path, what: str) -> int:
    """How many lines the scan has written so far: of levels, or of all tensors together."""
    return sum(file.read_bytes().count(b"\n") for file in (run / "scan" / what).glob("*/*.jsonl"))


# What says that a run has come to the middle of a stage.
MOMENTS: dict[str, Callable[[Path], object]] = {
    "shards": lambda run: any((run / "shards").glob("train-*.tar")),
    "joining Ray": lambda run: (run / "lease.json").exists() and has_threads_of_ray(run),
    "dense": lambda run: newest_step(run / "dense/steps"),
    "scan": lambda run: measured(run, LEVELS),
    "together": lambda run: measured(run, TOGETHER),
    "rounds": lambda run: newest_step(run / "rounds/01/steps"),
    "final": lambda run: (run / "rounds/finished.json").exists(),
    "report": lambda run: (run / "result.json").exists(),
}
# What says that it has left it.
OVER = {
    "shards": "shards/finished.json",
    "joining Ray": "dense/steps",
    "dense": "dense/finished.json",
    "scan": "scan/together",
    "together": "scan/scan.json",
    "rounds": "rounds/finished.json",
    "final": "result.json",
    "report": "final/finished.json",
}
_SHARDS = ("run.json", "config.yaml", "shards", "data.json")
_DENSE = (*_SHARDS, "dense")
_SCAN = (*_DENSE, "scan")
# What a run holds that begins shortly before a stage. Before the end Ray is needed once more, to look at test.
_BEFORE = {
    "shards": (),
    "joining Ray": _SHARDS,
    "dense": _SHARDS,
    "scan": _DENSE,
    "together": (*_DENSE, "scan/levels"),
    "rounds": _SCAN,
    "final": (*_SCAN, "rounds/01"),
    "report": (*_SCAN, "rounds/01"),
}


def begun(stage: str, whole: Path, runs: Path) -> Path:
    """The folder of a run in `runs` that holds what a whole one holds before a stage."""
    run = runs / whole.name
    run.mkdir(parents=True)
    for name in _BEFORE[stage]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        if (whole / name).is_dir():
            shutil.copytree(whole / name, run / name)
        else:
            shutil.copy(whole / name, run / name)
    return run
