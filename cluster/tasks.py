"""Work on many items by Ray tasks, on all nodes of a cluster: results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, TypeVar

from cluster import connect
from pipeline.base.errors import Away
from pipeline.base.spread import Spread, caught, told
from pipeline.settings.config import Config

T = TypeVar("T")
R = TypeVar("R")
CORE = {"CPU": 1.0}  # what a task needs
PAUSE_S = 1.0  # between two looks for room


def on_cluster(ray: Any, config: Config) -> Spread:
    """A task for each item, on a core of any node; a task whose node is lost is done again elsewhere.

    Raises UserError as the function does, and Away where no node has had a core for cluster.wait_seconds.
    """
    cores = int(sum(node.get("CPU", 0.0) for node in connect.nodes(ray)))

    def spread(function: Callable[[T], R], items: Iterable[T], count: int) -> Generator[R]:
        task, source, waiting = ray.remote(num_cpus=1)(caught), iter(items), deque[Any]()
        try:
            while True:
                for item in islice(source, 2 * max(1, cores) - len(waiting)):
                    waiting.append(task.remote(function, item))
                if not waiting:
                    return
                yield told(_answer(ray, waiting.popleft(), connect.Waiting(config.cluster.wait_seconds)))
        finally:
            for each in waiting:
                ray.cancel(each)

    return spread


def _answer(ray: Any, task: Any, patience: connect.Waiting) -> Any:
    """What a task returns. Ray itself would wait forever for a node that could do it."""
    while not ray.wait([task], timeout=PAUSE_S)[0]:
        nodes = connect.nodes(ray)
        if patience.too_long(lacking=not connect.room(nodes, CORE)):
            has = connect.amounts({"CPU": sum(node.get("CPU", 0.0) for node in nodes)})
            said = patience.said(f"A task needs {connect.amounts(CORE)}, but the cluster has {has}: add nodes")
            raise Away(f"shards: {said}")
    return ray.get(task)


def reaches_all(ray: Any, config: Config) -> bool:
    """Whether every node of a cluster of several sees the files that shards are built from."""
    root = config.data.root
    return root is not None and len(connect.nodes(ray)) > 1 and not connect.blind(ray, root)
