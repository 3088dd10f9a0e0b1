"""LeNet-300-100 on two nodes, with shards and state only on S3: a node is lost, then the whole cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.nodes import Network, Node, Submitted, network, possible
from faults.runs import LONG, same_weights
from support import FETCH, PREPARE, ROOT, WATCH, alone_on_the_network, environment

from pipeline.data import shards
from pipeline.settings.config import parse_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.faults,
    pytest.mark.skipif(not possible(), reason="this system gives no networks and process spaces of its own"),
]
LENET: dict[str, Any] = {
    "name": "lenet",
    "data": {
        "source": "shards",
        "root": "s3://store/shards",
        "resize": 28,
        "augment": ["shift"],
        "shift": 1,
        "cache_bytes": 0,
    },
    "model": {"factory": "lenet_300_100"},
    "dense": {"epochs": 10, "steps": 100, "batch_size": 128, "lr": 0.1},
    "prune": {"allocation": "uniform", "rounds": 2, "dense_control": False},
    "retrain": {"epochs": 24, "steps": 240, "batch_size": 128, "lr": 0.05, "checkpoint_steps": 20},
    "target": {"compression": 12},
    "cluster": {"workers": 2, "placement": "spread", "lease_seconds": 20},
    "tracking": {"enabled": False},
}

REPEATED = f"<={LENET['retrain']['checkpoint_steps']}"


@dataclass(frozen=True)
class Undisturbed:
    """A run of two processes without Ray that nothing happened to, and where its shards and config lie."""

    shards: Path
    config: Path
    run: Path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("lenet")
    mnist = Path(os.environ.get("SECATEUR_DATA", "")) / "mnist"
    source = {"source": "idx", "root": str(mnist)} if mnist.is_dir() else {"source": "digits"}
    shards.build(parse_config({"name": "shards", "data": source}).data, 0, str(root / "shards"))
    config = root / "job/lenet.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(LENET))
    command = [*alone_on_the_network(), sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["-m", "pipeline"]
    command += ["run", str(config), f"data.root={root / 'shards'}", f"runs_dir={root / 'runs'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == 0, done.stderr
    return Undisturbed(root / "shards", config, root / "runs/lenet")


@pytest.fixture(scope="module")
def where(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A network with shards on S3."""
    with network(tmp_path_factory.mktemp("network")) as made:
        prepared = made.run(sys.executable, "-c", PREPARE, str(undisturbed.shards))
        assert prepared.returncode == 0, prepared.stderr
        yield made


@pytest.fixture
def two_nodes(where: Network) -> Iterator[list[Node]]:
    """Two nodes that are one cluster, the head first."""
    yield where.cluster(2, cpus=2)
    for node in where.nodes:
        node.kill()


def wait_for_a_checkpoint_of_round_1(where: Network, name: str, job: Submitted) -> None:
    command = [*where.at_hub(), sys.executable, "-c", WATCH, f"s3://store/runs/{name}"]
    watch, deadline = subprocess.Popen(command, env=where.hub_env()), time.monotonic() + LONG
    try:
        while watch.poll() is None:
            assert job.process.poll() is None, job.output
            assert time.monotonic() < deadline, job.output
            time.sleep(0.05)
    finally:
        watch.kill()
    assert watch.wait() == 0


def fetched(where: Network, name: str) -> Path:
    """A folder with the final weights of a run on S3."""
    file = "final/model.safetensors"
    got = where.run(sys.executable, "-c", FETCH, f"s3://store/runs/{name}", str(where.folder), file)
    assert got.returncode == 0, got.stderr
    run = where.folder / name
    (run / "final").mkdir(parents=True)
    (where.folder / file.replace("/", "-")).rename(run / file)
    return run


def test_a_run_goes_on_by_itself_when_a_node_is_killed_in_a_round(
    where: Network, two_nodes: list[Node], undisturbed: Undisturbed, line: Callable[..., None]
) -> None:
    head, other = two_nodes
    own = f"runs_dir={where.mount}/runs"  # the same path on each node, and another folder
    blind = Submitted(where, head, undisturbed.config, own)
    blind.finish(2)
    assert f"'{where.mount}/runs/lenet' is not visible on {other.name}: put runs_dir on storage" in blind.output

    job = Submitted(where, head, undisturbed.config, "name=node")
    wait_for_a_checkpoint_of_round_1(where, "node", job)
    assert [len(node.processes("RayTrainWorker")) for node in two_nodes] == [1, 1]
    other.kill()
    lost = job.wait_for("rounds/01: resumed at step")
    job.finish()
    assert same_weights(fetched(where, "node"), undisturbed.run)
    line("SIGKILL of a node of two", "identical", REPEATED, lost)


def test_a_run_goes_on_in_a_new_cluster_when_the_head_is_killed_in_a_round(
    where: Network, two_nodes: list[Node], undisturbed: Undisturbed, line: Callable[..., None]
) -> None:
    first = Submitted(where, two_nodes[0], undisturbed.config, "name=head")
    wait_for_a_checkpoint_of_round_1(where, "head", first)
    killed = time.monotonic()
    for node in two_nodes:
        node.kill()
    first.wait_for("lost; trying again")
    first.process.send_signal(signal.SIGINT)
    first.finish(130)
    assert "no longer following job" in first.output

    new = where.cluster(2, cpus=2)
    again = Submitted(where, new[0], undisturbed.config, "name=head")
    again.wait_for("rounds/01: resumed at step")
    lost = time.monotonic() - killed
    again.finish()
    assert same_weights(fetched(where, "head"), undisturbed.run)
    line("SIGKILL of the head, and a new cluster", "identical", REPEATED, lost)
