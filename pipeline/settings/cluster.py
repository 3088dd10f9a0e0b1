"""Settings of Ray and MLflow."""

from __future__ import annotations

import os
import warnings
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.settings.base import Positive, Section, Text


def _workers(value: Any) -> Any:
    """Refuse what is neither a number of workers nor a range, with one message instead of one for each type."""
    ends = list(value) if isinstance(value, list | tuple) else [value, value]
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if len(ends) != 2 or not whole or not 1 <= ends[0] <= ends[1]:
        raise ValueError(
            f"{value!r} is neither a number of workers nor a range of them: give 1 or more, as in 2, or [min, max] "
            "with 1 <= min <= max, as in [2, 8]"
        )
    return value


def _gpus(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError(f"{value:g} GPUs cannot be reserved: give a share below 1, or a whole number")
    return value


Gpus = Annotated[float, Field(ge=0.0), AfterValidator(_gpus)]

Workers = Annotated[Positive | tuple[Positive, Positive], BeforeValidator(_workers)]


class Cluster(Section):
    """What a run asks of Ray."""

    address: str | None = Field(None, description="Ray cluster to join: auto, or host:port; by default a local one.")
    workers: Workers = Field(
        1,
        description="Processes that train together: a number, or a range [min, max]. With a range, a training uses as "
        "many as the cluster has room for, and goes on with more or fewer when nodes come or go.",
    )
    cpus_per_worker: Annotated[float, Field(gt=0.0)] = Field(1.0, description="CPUs reserved for each worker.")
    gpus_per_worker: Gpus = Field(0.0, description="GPUs reserved for each worker.")
    cpus_per_trial: Annotated[float, Field(gt=0.0)] = Field(1.0, description="CPUs reserved for each scan trial.")
    gpus_per_trial: Gpus = Field(
        0.0,
        description="Share of a GPU reserved for each scan trial, as in 0.25. With 0 all trials of a node use its "
        "first GPU at once.",
    )
    placement: Literal["pack", "spread"] = Field(
        "pack", description="pack: workers on as few nodes as hold them; spread: on as many nodes as there are."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3,
        description="How often lost workers, or a lost scan trial, are replaced with no new checkpoint, or level, in "
        "between. Losses after a preemption notice do not count.",
    )
    wait_seconds: Annotated[float, Field(gt=0.0)] = Field(
        600.0, description="How long a run waits for room after a node is lost, such as an autoscaler's new node."
    )
    hang_seconds: Annotated[float, Field(ge=1.0)] = Field(
        1800.0,
        description="How long workers wait for one that does not go on before it counts as lost, under Ray and "
        "torchrun. A slow one that goes on is waited for.",
    )
    resize_seconds: Annotated[float, Field(gt=0.0)] = Field(
        60.0,
        description="How often a training with a range of workers looks for room for more workers; to grow, it starts "
        "again from its last checkpoint.",
    )
    lease_seconds: Annotated[float, Field(ge=1.0)] = Field(
        60.0,
        description="With runs_dir on S3: how long a run's driver must be silent before another may take the run over.",
    )
    ray_logs: bool = Field(False, description="Also show what Ray's own processes print.")

    @property
    def min_workers(self) -> int:
        """The fewest workers that a training goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that a training uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def place(self) -> str:
        """The Ray cluster that is meant: cluster.address, RAY_ADDRESS, or `local`, which is started on this machine."""
        return self.address or os.environ.get("RAY_ADDRESS") or "local"


with warnings.catch_warnings():
    # pydantic means ABCMeta.register, which no section needs.
    warnings.filterwarnings("ignore", message='Field name "register" in "Tracking" shadows an attribute')

    class Tracking(Section):
        """MLflow."""

        enabled: bool = Field(True, description="Mirror the run to MLflow.")
        uri: Text | None = Field(
            None, description="Tracking server; by default sqlite in runs_dir/mlflow.db, unless runs_dir is a URL."
        )
        experiment: Text = Field("secateur", description="Experiment the run is filed under.")
        register: Text | None = Field(
            None,
            description="Name under which MLflow's model registry gets the final network, a version a run. The alias "
            "champion goes to the smallest one without loss.",
        )
        models: Literal["rounds", "final", "none"] = Field(
            "rounds",
            description="Networks that MLflow gets as models: that of each accepted round and the final one, the final "
            "one alone, or none. A round's takes as many bytes as its tensors in their dense shapes.",
        )
        system_metrics: bool = Field(
            True,
            description="What the run's machines are busy with, every 30 s: processors, memory, disk, network, GPUs.",
        )

        @property
        def watches_machines(self) -> bool:
            """Whether anything asks what the machines are busy with."""
            return self.enabled and self.system_metrics


def asked(workers: int | tuple[int, int]) -> str:
    """`cluster.workers` as it was written: 2, or [2, 8]."""
    return str(workers if isinstance(workers, int) else list(workers))
