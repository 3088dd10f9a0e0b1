"""A Ray cluster of several nodes on one machine, in a network of its own.

As a program it makes the cluster and obeys the lines that `Nodes` writes to it: Ray wants nodes added on a main thread,
and a network of its own has to be entered by a new process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from faults.runs import RayRun
from support import ROOT, alone_on_the_network, environment


class Nodes:
    """The cluster: a head without CPUs, and nodes known by the numbers that `add` returns."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / f"nodes-{time.monotonic_ns()}.txt"
        self.ray_folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets lie below; their paths must be short
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [*alone_on_the_network(), sys.executable, __file__], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                env=environment(RAY_TMPDIR=self.ray_folder),
            )  # fmt: skip
        self.address = self._ask("address")

    def _ask(self, *words: str | int) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()
        return json.loads(answer)

    def add(self, cpus: int = 1) -> int:
        """Add a node and wait until it is alive."""
        return int(self._ask("add", cpus))

    def remove(self, number: int) -> None:
        """SIGKILL the processes of a node."""
        self._ask("remove", number)

    def drain(self, number: int, seconds: int) -> None:
        """Give notice that a node will be taken away in so many seconds."""
        self._ask("drain", number, seconds)

    def run(self, config: Path, runs: Path, *overrides: str) -> RayRun:
        """Start a run on the cluster."""
        enter = ["nsenter", f"--target={self.process.pid}", "--net"] if alone_on_the_network() else []
        return RayRun(config, runs, f"cluster.address={self.address}", *overrides, prefix=enter)

    def close(self) -> None:
        """End all nodes."""
        if self.process.poll() is None:
            self._ask("close")
        self.process.wait(60)
        shutil.rmtree(self.ray_folder, ignore_errors=True)


def obey() -> None:
    """The program: a cluster, and one answer for each line."""
    from ray.cluster_utils import Cluster

    answers, sys.stdout = sys.stdout, sys.stderr  # where Ray prints, too
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes: list[Any] = []
    for line in sys.stdin:
        what, *words = json.loads(line)
        answer: Any = None
        if what == "address":
            answer = cluster.address
        elif what == "add":
            nodes.append(cluster.add_node(num_cpus=words[0]))
            answer = len(nodes) - 1
        elif what == "remove":
            cluster.remove_node(nodes[words[0]], allow_graceful=False)
        elif what == "drain":
            drain(cluster.address, nodes[words[0]].node_id, words[1])
        elif what == "close":
            break
        print(json.dumps(answer), file=answers, flush=True)
    cluster.shutdown()  # also where the test has ended without a word
    print(json.dumps(None), file=answers, flush=True)


def drain(address: str, node: str, seconds: int) -> None:
    """A cloud's notice, as its node provider hands it to Ray."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + seconds) * 1000)
    accepted, why = GcsClient(address=address).drain_node(node, reason, "taken away", deadline)
    assert accepted, why


if __name__ == "__main__":
    obey()
