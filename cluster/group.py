"""What Ray Train starts for a training: its controller, and workers that join a process group of torch's.

Ray Train's own trainer for torch loads torch in the controller too, which never uses it, and starts a process for data
sets of Ray Data, of which there are none here. Each is seconds before every training.

Imported where Ray is up: the base classes need it. It must not load torch itself, or the controller would.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train._internal.utils import get_address_and_port  # noqa: PLC2701 (test_ray_private.py names it)
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback  # noqa: PLC2701
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

LEAVING_S = 30.0  # for the workers of a training that is over; more of them may be gone


class Trainer(DataParallelTrainer):
    """Ray Train's trainer, without its process for data sets."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, DatasetsCallback)]


@dataclass
class ProcessGroup(BackendConfig):
    """That the workers join one process group: `backend` (nccl, gloo), and seconds until a collective gives up."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """What brings the workers together."""
        return Joined


class Joined(Backend):
    """Brings the workers of a training together; lives in the controller."""

    share_cuda_visible_devices = True  # a worker sees its node's GPUs, and takes that of its local rank

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have all workers join, where rank 0 is. Raises what a worker raises."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        ray.get(worker_group.execute_async(join, address, port, backend_config.backend, backend_config.timeout_s))

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        """Have all workers leave, those that still answer."""
        ray.wait(left := worker_group.execute_async(leave), num_returns=len(left), timeout=LEAVING_S)


def join(address: str, port: int, backend: str, timeout_s: int) -> None:
    """Join the process group, on a worker; variables of the environment are those that torchrun sets."""
    import torch.distributed as dist

    context = ray.train.get_context()
    ranks = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(rank) for name, rank in ranks.items()}, MASTER_ADDR=address, MASTER_PORT=str(port))
    dist.init_process_group(backend, "env://", timeout=timedelta(seconds=timeout_s))


def leave() -> None:
    """Leave the process group, on a worker."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()
