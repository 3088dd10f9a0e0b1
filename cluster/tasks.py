"""Work on many items by Ray tasks, on all nodes of a cluster: results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import Any, TypeVar

from cluster import connect
from pipeline.base.spread import Spread, caught, told
from pipeline.settings.config import Config

T = TypeVar("T")
R = TypeVar("R")


def on_cluster(ray: Any) -> Spread:
    """A task for each item, on a core of any node; a task whose node is lost is done again elsewhere.

    Raises UserError as the function does.
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
                yield told(ray.get(waiting.popleft()))
        finally:
            for each in waiting:
                ray.cancel(each)

    return spread


def reaches_all(ray: Any, config: Config) -> bool:
    """Whether every node of a cluster of several sees the files that shards are built from."""
    root = config.data.root
    return root is not None and len(connect.nodes(ray)) > 1 and not connect.blind(ray, root)
