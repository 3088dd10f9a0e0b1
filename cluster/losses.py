"""What Ray says of processes that it lost, in a sentence of ours, and how often a loss is made good."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any

from pipeline import storage
from pipeline.base import blame
from pipeline.run.state import Run
from pipeline.train.world import lost_touch

_NODE = re.compile(r"Memory on the node \(IP: (?P<node>[^,]+), ID: [^)]*\) was (?P<used>\S+)GB used / (?P<limit>\S+)GB")
_KILLED = re.compile(r"Selected to kill: [^\n]*?pid=(?P<pid>\d+), actual memory used=(?P<memory>[\d.]+)GB")
# Ray Train's errors for workers that are gone, or never came.
OF_RAY_TRAIN = {
    "WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError", "WorkerGroupStartupTimeoutError",
    "WorkerGroupStartupFailedError", "InsufficientClusterResourcesError",
}  # fmt: skip
_IN_ACTOR = re.compile(r"^\s*(pid|ip): (\S+)$", re.MULTILINE)


def told(error: BaseException) -> str:
    """One sentence for an error of Ray's about a process that it lost, or for any other error of a worker."""
    inner = getattr(error, "health_check_failure", None) or getattr(error, "cause", None)
    if inner is not None:
        return told(inner)
    text = str(error)
    if "low on memory" in text:
        return _memory(text)
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return "its process does not answer"
    where = dict(_IN_ACTOR.findall(text))
    on = "".join(
        f" {word} {where[key]}" for key, word in (("pid", "with process id"), ("ip", "on node")) if key in where
    )
    if "node" in text.lower() and ("has died" in text or "was terminated" in text) and "worker process" not in text:
        return f"its node was lost{on.partition(' with process id')[0] or on}"
    if type(error).__name__ in ("ActorDiedError", "RayActorError", "WorkerCrashedError", "ActorUnavailableError"):
        return f"its process{on} died (killed, or out of the machine's memory, or crashed)"
    return blame.text(error)[:400]


def is_memory(error: BaseException) -> bool:
    """Whether Ray's memory monitor killed the process."""
    cause = getattr(error, "health_check_failure", error)
    return type(cause).__name__ == "OutOfMemoryError" or "low on memory" in str(cause)


def is_loss(failure: Exception) -> bool:
    """Whether a training of Ray Train's, or a task, failed because processes or nodes were lost, or never came.

    Not by an error of its own code, and not by a lack of memory, which would come again.
    """
    causes = [*getattr(failure, "worker_failures", {}).values()] or [getattr(failure, "controller_failure", failure)]
    return all(not is_memory(cause) and (type(cause).__name__ in OF_RAY_TRAIN or is_rays(cause)) for cause in causes)


def _memory(text: str) -> str:
    node, killed = _NODE.search(text), _KILLED.search(text)
    said = "Ray's memory monitor killed its process"
    if killed is not None:
        said += f" {killed['pid']}, which used {killed['memory']} GB"
    if node is not None:
        said += f", on node {node['node']}, where {node['used']} of {node['limit']} GB were in use"
    return said


def of_group(failures: Mapping[int, BaseException]) -> str:
    """One sentence for a worker group of which ranks were lost; those that only lost touch with them are left out."""
    causes = {
        rank: error for rank, error in failures.items() if not (isinstance(error, Exception) and lost_touch(error))
    }
    shown = sorted((causes or failures).items())[:3]
    return "; ".join(f"rank {rank} was lost: {told(error)}" for rank, error in shown)


NOT_AGAIN = "it was not tried again, since that would end the same way"
REMEDIES = "give each worker more room (cluster.cpus_per_worker, fewer cluster.workers), or lower data.cache_bytes"


class Tries:
    """How often something may be tried again: losses count only while nothing new, as a checkpoint, came in between."""

    def __init__(self, most: int, what: str) -> None:
        """`most` is cluster.max_failures; `what` comes in between, in words."""
        self.most, self.what = most, what
        self.count = 0

    def again(self, progressed: bool) -> bool:
        """Count a loss; `progressed` says whether anything new came since the last one. Whether to try again."""
        self.count = 1 if progressed else self.count + 1
        return self.count <= self.most

    def said(self) -> str:
        """How often it was tried again until this loss, which was one too many."""
        if not self.most:
            return "it was not tried again (cluster.max_failures=0)"
        times = f"{self.count - 1} times" if self.count != 2 else "once"
        return f"it was tried again {times} without a newer {self.what} (cluster.max_failures={self.most})"


class Written:
    """What a stage of a run has written for good; `folder` is the stage's."""

    def __init__(self, run: Run, folder: str) -> None:
        self.run, self.folder = run, folder
        self._seen = marks(run, folder)

    def more(self) -> bool:
        """Whether there is something new since the last look."""
        before, self._seen = self._seen, marks(self.run, self.folder)
        return bool(self._seen - before)


def marks(run: Run, folder: str) -> Set[str]:
    """What a stage has written for good so far: its documents and the manifests of its whole checkpoints."""
    here = run.path(folder)
    found = {f"{folder}/{name}" for name in storage.list_files(here) if name.endswith(".json")}
    for inner in storage.list_folders(here):
        found |= marks(run, f"{folder}/{inner}")
    return found


def is_rays(error: Any) -> bool:
    """Whether an error is one of Ray's own about a process, and not one that a function raised there."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
