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

import pytest
import yaml
from faults.nodes import Network, Submitted, network, possible
from faults.runs import same_weights
from support import FETCH, PREPARE, ROOT, WATCH, environment

from pipeline import config as settings
from pipeline.data import shards

pytestmark = [
    pytest.mark.ray,
    pytest.mark.faults,
    pytest.mark.skipif(not possible(), reason="this system gives no networks and process spaces of its own"),
]
LENET = {
    "name": "lenet",
    "data": {"source": "shards", "root": "s3://store/shards", "augment": ["shift"], "shift": 1, "cache_bytes": 0},
    "model": {"factory": "lenet_300_100"},
    "dense": {"epochs": 1, "steps": 150, "batch_size": 128, "lr": 0.1},
    "prune": {"allocation": "uniform", "rounds": 2, "dense_control": False},
    "retrain": {"epochs": 4, "steps": 600, "batch_size": 128, "lr": 0.05, "checkpoint_steps": 50},
    "target": {"compression": 12},
    "cluster": {"workers": 2, "placement": "spread", "lease_seconds": 20},
    "tracking": {"enabled": False},
}


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
    if mnist.is_dir():
        source, size, inputs = {"source": "idx", "root": str(mnist)}, 28, 784
    else:  # scikit-learn's digits, enlarged
        source, size, inputs = {"source": "digits", "size": 28, "resize": 28}, 28, 784
    build = settings.parse({"name": "shards", "data": source})
    shards.build(build.data, 0, str(root / "shards"))
    values = {**LENET, "data": {**LENET["data"], "size": size}}
    values["model"] = {"factory": "lenet_300_100", "kwargs": {"inputs": inputs}}
    config = root / "job/lenet.yaml"
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline"]
    command += ["run", str(config), f"data.root={root / 'shards'}", f"runs_dir={root / 'runs'}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return Undisturbed(root / "shards", config, root / "runs/lenet")


@pytest.fixture
def two_nodes(undisturbed: Undisturbed, tmp_path: Path) -> Iterator[Network]:
    """A network with shards on S3, and two nodes that are one cluster."""
    with network(tmp_path) as made:
        prepared = made.run(sys.executable, "-c", PREPARE, str(undisturbed.shards))
        assert prepared.returncode == 0, prepared.stderr
        made.cluster(2, cpus=2)
        yield made


def wait_for_a_checkpoint_of_round_1(where: Network, job: Submitted) -> None:
    watched = where.run(sys.executable, "-c", WATCH, "s3://store/runs/lenet")
    assert watched.returncode == 0, watched.stderr + job.output
    assert job.process.poll() is None, job.output


def fetched_run(where: Network) -> Path:
    """A folder with the final weights of the run on S3."""
    name = "final/model.safetensors"
    fetched = where.run(sys.executable, "-c", FETCH, "s3://store/runs/lenet", str(where.folder), name)
    assert fetched.returncode == 0, fetched.stderr
    run = where.folder / "lenet"
    (run / "final").mkdir(parents=True)
    return (where.folder / name.replace("/", "-")).rename(run / name).parents[1]


def test_a_folder_that_only_the_head_sees_is_refused(two_nodes: Network, undisturbed: Undisturbed) -> None:
    own = f"runs_dir={two_nodes.mount}/runs"  # the same path on each node, and another folder
    job = Submitted(two_nodes, two_nodes.nodes[0], undisturbed.config, own)
    job.finish(2)
    assert f"'{two_nodes.mount}/runs/lenet' is not visible on node3: put runs_dir on storage" in job.output


def test_a_run_goes_on_by_itself_when_a_node_is_killed_in_a_round(
    two_nodes: Network, undisturbed: Undisturbed, line: Callable[..., None]
) -> None:
    head, other = two_nodes.nodes
    job = Submitted(two_nodes, head, undisturbed.config)
    wait_for_a_checkpoint_of_round_1(two_nodes, job)
    assert [len(node.processes("RayTrainWorker")) for node in two_nodes.nodes] == [1, 1]
    other.kill()
    lost = job.wait_for("rounds/01: resumed at step")
    job.finish()
    assert same_weights(fetched_run(two_nodes), undisturbed.run)
    line("SIGKILL of a node of two", "identical", None, lost)


def test_a_run_goes_on_in_a_new_cluster_when_the_head_is_killed_in_a_round(
    two_nodes: Network, undisturbed: Undisturbed, line: Callable[..., None]
) -> None:
    first = Submitted(two_nodes, two_nodes.nodes[0], undisturbed.config)
    wait_for_a_checkpoint_of_round_1(two_nodes, first)
    killed = time.monotonic()
    for node in two_nodes.nodes:
        node.kill()
    first.wait_for("lost; trying again")
    first.process.send_signal(signal.SIGINT)
    first.finish(130)
    assert "no longer following job" in first.output

    new = two_nodes.cluster(2, cpus=2)
    again = Submitted(two_nodes, new[0], undisturbed.config)
    again.wait_for("rounds/01: resumed at step")
    lost = time.monotonic() - killed
    again.finish()
    assert same_weights(fetched_run(two_nodes), undisturbed.run)
    line("SIGKILL of the head, and a new cluster", "identical", None, lost)
