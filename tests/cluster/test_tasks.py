"""Work that Ray tasks share out: what is said where the cluster has no node left that could do it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import ROOT, alone_on_the_network, environment

pytestmark = pytest.mark.ray

# A cluster as it is left when all its workers' nodes are gone: the head has no cores for tasks.
WITHOUT_WORKERS = """
import ray
from cluster import tasks
from pipeline.base.errors import Away
from pipeline.settings.config import parse_config

ray.init(address="local", num_cpus=0, include_dashboard=False, logging_level="error")
config = parse_config({"name": "x", "cluster": {"wait_seconds": 3}})
try:
    list(tasks.on_cluster(ray, config)(abs, [1, -2], 2))
except Away as error:
    print(error)
"""


def test_work_that_no_node_can_do_any_more_is_given_up_with_one_message() -> None:
    command = [*alone_on_the_network(), sys.executable, "-c", WITHOUT_WORKERS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=120
    )
    said = (
        "shards: waited cluster.wait_seconds=3 for room. A task needs 1 CPU, but the cluster has 0 CPU: add nodes. "
        "The same command goes on"
    )
    assert done.stdout.splitlines().count(said) == 1, done.stderr  # Ray's autoscaler says something, too
