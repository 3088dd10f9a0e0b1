"""Names the fault tests that cover what changed since a commit: `.ci/run` runs these.

    python tests/faults/affected.py [COMMIT]

By default COMMIT is the one that `seen.md` names, beside what was seen of the suite there. A change to a shared part of
the tests themselves names the files that use it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_RAY = (
    "cluster/connect.py",
    "cluster/engine.py",
    "cluster/train.py",
    "cluster/group.py",
    "cluster/losses.py",
    "cluster/board.py",
)
_TRAINING = ("pipeline/train/*", "pipeline/rounds/*", "pipeline/stages.py")
_STORE = ("pipeline/storage/*",)
_STREAM = ("pipeline/data/stream.py", "pipeline/data/cache.py", "pipeline/data/split.py", "pipeline/data/manifest.py")
# What each file of fault tests covers, as patterns of paths.
COVERS: dict[str, tuple[str, ...]] = {
    "test_cancelled": (*_RAY, "pipeline/cli/*", "pipeline/stages.py", "pipeline/tracking/mirror.py"),
    "test_commands_on_s3": ("cluster/cli.py", "pipeline/storage/s3.py", "pipeline/export/*"),
    "test_corrupt": (*_STREAM, "pipeline/train/checkpoint.py"),
    "test_disk": (*_STORE, "pipeline/data/cache.py", "pipeline/run/journal.py"),
    "test_elastic": (*_RAY, "cluster/patience.py", "cluster/spot.py", "pipeline/train/*"),
    "test_fence": (*_STORE, "pipeline/run/lease.py", "pipeline/run/state.py"),
    "test_hangs": (
        "pipeline/train/roll.py",
        "pipeline/train/memory.py",
        "pipeline/train/world.py",
        "pipeline/local.py",
    ),
    "test_jobs": ("cluster/submit.py", "cluster/job_env.py", "cluster/connect.py"),
    "test_kept": ("cluster/train.py", "cluster/engine.py", "pipeline/train/checkpoint.py"),
    "test_lost_workers": (*_RAY, "pipeline/train/roll.py", "pipeline/train/memory.py"),
    "test_mlflow_away": ("pipeline/tracking/*",),
    "test_mutated_configs": ("pipeline/settings/*", "pipeline/rounds/preflight.py", "pipeline/rounds/idle.py"),
    "test_mutated_shards": ("pipeline/data/*",),
    "test_processes": (*_RAY, *_TRAINING, "pipeline/run/*"),
    "test_replaced_shards": (*_STREAM, "pipeline/rounds/same_data.py"),
    "test_runs_on_s3": (*_STORE, "pipeline/run/*", "pipeline/data/push.py"),
    "test_s3_away": (*_STORE, *_STREAM),
    "test_scan_bookkeeping": ("pipeline/scan/*", "pipeline/run/journal.py"),
    "test_scan_nodes": ("cluster/sweep.py", "cluster/losses.py", "pipeline/scan/*"),
    "test_scan_trials": ("cluster/sweep.py", "cluster/losses.py", "pipeline/scan/*"),
    "test_twenty_runs": ("pipeline/run/lease.py", "pipeline/run/state.py", "pipeline/tracking/*"),
    "test_two_mounts": ("pipeline/run/lease.py", "pipeline/storage/local.py", "pipeline/storage/locks.py"),
    "test_two_nodes": (*_RAY, *_STORE, *_STREAM),
}


def affected(changed: list[str]) -> list[str]:
    """The files of fault tests that cover some of the changed paths, or use them. Sorted."""
    return sorted(
        f"tests/faults/{name}.py"
        for name, patterns in COVERS.items()
        if any(fnmatch(path, pattern) for path in changed for pattern in (*patterns, *_own(name)))
    )


def _own(name: str) -> list[str]:
    """A test file itself, and the parts in this folder that it imports."""
    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    return [
        f"tests/faults/{part}.py" for part in [name, *re.findall(r"^from faults\.(\w+) import", text, re.MULTILINE)]
    ]


def base() -> str:
    """The commit that `seen.md` names."""
    found = re.search(r"`([0-9a-f]{40})`", (HERE / "seen.md").read_text(encoding="utf-8"))
    assert found is not None, "seen.md names no commit"
    return found[1]


def main() -> None:
    commit = sys.argv[1] if len(sys.argv) > 1 else base()
    diff = subprocess.run(
        ["git", "diff", "--name-only", commit, "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if diff.returncode:
        print(
            f"what changed since {commit} is not known, so no fault test runs: {diff.stderr.strip()}", file=sys.stderr
        )
        return
    print(*affected(diff.stdout.split()))


if __name__ == "__main__":
    main()
