"""A cluster of several nodes on one machine: each in a network, process space and memory of its own.

A node sees its own processes only, has its own name, its own /dev/shm and its own temporary folder (the same path on
every node, with other content), and reaches the others over a bridge. Killing its first process kills all of it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from faults.runs import LONG
from support import S3_ENVIRONMENT, environment, hearing_ctrl_c, processes_in, start_moto

_HUB, _S3_PORT = 1, 5555
# Own /dev/shm and temporary folder, a name that stands for its address (or gloo would tell others that it is at
# 127.0.0.1), then Ray; the shell is the node's first process.
_START = (
    'hostname "$NODE" && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs "$TMPDIR" && cd "$TMPDIR" && '
    'echo "127.0.0.1 localhost\n$ADDRESS $NODE" > hosts && mount --bind hosts /etc/hosts && '
    "mkdir cwd && cd cwd && { ray start --block --disable-usage-stats --temp-dir=$TMPDIR/ray --num-cpus=$CPUS "
    "--object-store-memory=100000000 $@ & wait; }"
)


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"


@cache
def possible() -> bool:
    """Whether this system lets us make networks and process spaces."""
    if not all(shutil.which(name) for name in ("ip", "nsenter", "unshare")):
        return False
    name = f"try{os.getpid()}"
    with contextlib.suppress(AssertionError):
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "br0", "type", "bridge")
            command = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--mount", "true"]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        finally:
            _ip("netns", "del", name)
    return False


class Node:
    """Ray on a node: the head, or one that joins it."""

    def __init__(self, network: Network, number: int, cpus: int, head: Node | None) -> None:
        self.name, self.address = f"node{number}", network.address(number)
        self.log = network.folder / f"node-{number}.txt"
        address, namespace = f"--node-ip-address={self.address}", network.namespace(number)
        if head is None:
            args = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", "--dashboard-port=8265", address]
        else:
            args = [f"--address={head.address}:6379", address]
        command = ["nsenter", f"--net=/run/netns/{namespace}", "unshare", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "--uts", "--mount", "sh", "-c", _START, "sh", *args]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                command, env={**network.env, "NODE": self.name, "ADDRESS": self.address, "CPUS": str(cpus)}, cwd="/",
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def dashboard(self) -> str:
        return f"http://{self.address}:8265"

    def first_process(self) -> int:
        """The node's first process, by its number outside."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def processes(self, words: str) -> list[int]:
        """Processes of the node whose command holds `words`, by their numbers outside."""
        return processes_in("pid", self.first_process(), words)

    def kill(self) -> None:
        """SIGKILL every process of the node at once: what the kernel does when the first one dies."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError):
                os.kill(self.first_process(), signal.SIGKILL)
            self.process.wait(30)


class Network:
    """A hub, where an S3 server and whoever submits jobs live, and the nodes around it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes = folder, list[Node]()
        self.mount = tempfile.mkdtemp(prefix="n", dir="/tmp")  # Ray's sockets lie below; their paths must be short
        self._namespaces, self._next = list[str](), _HUB + 1
        self._claim()
        self.env = environment(
            **S3_ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{self.address(_HUB)}:{_S3_PORT}", TMPDIR=self.mount,
            RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32),
        )  # fmt: skip
        for name in ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_API_SERVER_ADDRESS"):
            self.env.pop(name, None)
        self.server: subprocess.Popen[bytes] | None = None

    def _claim(self) -> None:
        """Take addresses that no other such network has: the name of the hub can be made only once."""
        refused = list[str]()
        for self._third in range(256):
            try:
                self._add_namespace(_HUB)
                return
            except AssertionError as error:
                refused.append(str(error))
        raise AssertionError(f"no free network of 256; `ip netns list` shows what is in the way: {refused[0]}")

    def address(self, number: int) -> str:
        return f"10.77.{self._third}.{number}"

    def namespace(self, number: int) -> str:
        return f"secateur-{self._third}-{number}"

    def open(self) -> None:
        """Make the hub and start its S3 server."""
        hub = self.namespace(_HUB)
        _ip("-n", hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{self.address(_HUB)}/24", "dev", "br0")
        _ip("-n", hub, "link", "set", "br0", "up")
        self.server = start_moto(_S3_PORT, self.at_hub(), self.address(_HUB))

    def _add_namespace(self, number: int) -> str:
        name = self.namespace(number)
        _ip("netns", "add", name)
        self._namespaces.append(name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def start(self, cpus: int, head: Node | None = None) -> Node:
        """Another node, at an address that none has had; it joins `head` or is one."""
        number, self._next = self._next, self._next + 1
        name, hub = self._add_namespace(number), self.namespace(_HUB)
        _ip("-n", hub, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", hub, "link", "set", f"v{number}", "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        self.nodes.append(Node(self, number, cpus, head))
        return self.nodes[-1]

    def cluster(self, size: int, cpus: int) -> list[Node]:
        """A head and the nodes that joined it, all of them up."""
        head = self.start(cpus)
        self.wait(lambda: self._jobs_answer(head), head)
        nodes = [head, *(self.start(cpus, head) for _ in range(size - 1))]
        self.wait(lambda: self.alive(head) == size, *nodes)
        return nodes

    def _jobs_answer(self, head: Node) -> bool:
        return self.run("ray", "job", "list", f"--address={head.dashboard}").returncode == 0

    def alive(self, head: Node) -> int:
        """How many nodes the cluster of a head has."""
        listed = self.run("ray", "list", "nodes", f"--address={head.dashboard}", "--filter=state=ALIVE")
        return listed.stdout.count("ALIVE")

    def wait(self, ready: Callable[[], Any], *nodes: Node, seconds: float = LONG) -> None:
        """Poll until `ready`; the nodes must live."""
        deadline = time.monotonic() + seconds
        while not ready():
            for node in nodes:
                assert node.process.poll() is None, node.log.read_text()
            assert time.monotonic() < deadline, "\n".join(node.log.read_text() for node in nodes)
            time.sleep(0.5)

    def at_hub(self) -> list[str]:
        """A command prefix: at the hub."""
        return ["nsenter", f"--net=/run/netns/{self.namespace(_HUB)}"]

    def run(self, *command: str, cwd: Path | None = None, timeout: float = LONG, **extra: str) -> Any:
        """Run a command at the hub to its end."""
        return subprocess.run(
            [*self.at_hub(), *command], env=self.hub_env(**extra), cwd=cwd or self.folder, capture_output=True,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def hub_env(self, **extra: str) -> dict[str, str]:
        """The environment at the hub, whose temporary folder is this machine's."""
        return {**{name: value for name, value in self.env.items() if name != "TMPDIR"}, **extra}

    def close(self) -> None:
        """Kill all nodes and the S3 server, and remove what was made; also when opening has failed."""
        for node in self.nodes:
            node.kill()
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        for name in self._namespaces:
            subprocess.run(["ip", "netns", "del", name], check=False)
        shutil.rmtree(self.mount, ignore_errors=True)


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network that is gone when the block ends."""
    made = Network(folder)
    try:
        made.open()
        yield made
    finally:
        made.close()


class Submitted:
    """`secateur submit` at the hub, in the folder of the config; it follows the job, its output goes to a file."""

    def __init__(self, where: Network, head: Node, config: Path, *overrides: str) -> None:
        self.log = where.folder / f"submit-{time.monotonic_ns()}.txt"
        command = [sys.executable, "-m", "cluster", "submit", config.name, "--address", head.dashboard]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [*where.at_hub(), *hearing_ctrl_c([*command, "runs_dir=s3://store/runs", *overrides])],
                cwd=config.parent, env=where.hub_env(), stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def wait_for(self, words: str, times: int = 1, seconds: float = LONG) -> float:
        """Wait until the log says something so many times; returns the seconds that took."""
        started = time.monotonic()
        while self.output.count(words) < times:
            assert self.process.poll() is None, self.output
            assert time.monotonic() - started < seconds, self.output
            time.sleep(0.05)
        return time.monotonic() - started

    def finish(self, code: int = 0) -> None:
        """Wait for its end, and check its exit code."""
        try:
            found = self.process.wait(LONG)
        finally:
            self.process.kill()
        assert found == code, self.output
