"""How long a run stands still when a worker process, or a whole node, is lost: prints one table.

Two nodes on this machine (each in a network and process space of its own, see tests/faults/nodes.py), state on a
stand-in for S3, two workers. A worker process is killed, and Ray starts the group again; a node with one or both of
them is killed, the run goes on with the node that is left, and a new one joins. The time is that from the SIGKILL to
the line in the job's log that says at which step the run resumed.

Usage: python benchmarks/bench_recovery.py [REPEATS]
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.nodes import Network, Node, Submitted, network, possible  # noqa: E402
from support import MAKE_BUCKET  # noqa: E402

OVERRIDES = [
    "prune.allocation=uniform", "dense.epochs=2", "retrain.epochs=1000000", "retrain.checkpoint_steps=100",
    "tracking.enabled=false", "cluster.workers=2", "cluster.placement=spread", "cluster.max_failures=1000",
]  # fmt: skip
RESUMED = "rounds/01: resumed at step"


def workers(nodes: list[Node]) -> list[list[int]]:
    """The worker processes on each node."""
    return [node.processes("RayTrainWorker") for node in nodes]


def measure(where: Network, job: Submitted, head: Node, other: Node, repeats: int) -> dict[str, list[float]]:
    """Seconds from each SIGKILL to the resumption: of a worker process, and of the other node with its workers.

    Where Ray has put both workers on the head, only processes are killed until it spreads them again.
    """
    lost: dict[str, list[float]] = {"worker process": [], "node": []}
    nodes = [head, other]
    while any(len(seconds) < repeats for seconds in lost.values()):
        where.wait(lambda: where.alive(head) == 2 and sum(map(len, workers(nodes))) == 2, *nodes)
        seen = job.output.count(RESUMED)
        on_head, on_other = workers(nodes)
        if on_other and len(lost["node"]) < min(repeats, len(lost["worker process"])):
            nodes[1].kill()
            lost["node"].append(job.wait_for(RESUMED, seen + 1))
            nodes[1] = where.start(2, head)
        else:
            os.kill((on_head + on_other)[0], signal.SIGKILL)
            lost["worker process"].append(job.wait_for(RESUMED, seen + 1))
    return lost


def row(title: str, seconds: list[float]) -> str:
    return f"{title:<16} {statistics.median(seconds):>8.1f} {min(seconds):>8.1f} {max(seconds):>8.1f} {len(seconds):>7}"


def main() -> None:
    if not possible():
        raise SystemExit("this system gives no networks and process spaces of its own (root, ip, unshare, nsenter)")
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder, network(Path(folder)) as where:
        made = where.run(sys.executable, "-c", MAKE_BUCKET, SECATEUR_STORAGE_BACKOFF_S="2")  # its server starts
        assert made.returncode == 0, made.stderr
        head, other = where.cluster(2, cpus=2)
        config = Path(folder) / "demo.yaml"
        config.write_text((ROOT / "configs/demo.yaml").read_text())
        job = Submitted(where, head, config, *OVERRIDES)
        try:
            job.wait_for("rounds/01: epoch ")  # a line that comes after 30 s, beyond its first checkpoints
            lost = measure(where, job, head, other, repeats)
        finally:
            job.process.kill()
            job.process.wait()
    print(f"{'lost':<16} {'median':>8} {'min':>8} {'max':>8} {'repeats':>7}   seconds until the run resumed")
    for title, seconds in lost.items():
        print(row(title, seconds))


if __name__ == "__main__":
    main()
