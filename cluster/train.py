"""Ray Train: one worker group for all that a stage does; the work itself is a `pipeline.engine.Work`.

Checkpoints live in the run directory. The next start finds them there, be it Ray's restart of a worker group or a new
driver on another cluster. Ray's own record of a training is therefore thrown away.
"""

from __future__ import annotations

import os
import signal
import uuid
import warnings
from functools import partial
from typing import Any

import torch

from cluster import connect, losses
from cluster.board import Board
from cluster.connect import NoRoom
from cluster.losses import Tries, Written
from pipeline.base import blame, machine
from pipeline.base.errors import Agreed, Away, Leaving, Lost, RunStopped, UserError
from pipeline.engine import Work
from pipeline.run import log, machines
from pipeline.run.events import Busy, Event, Paced, Progress, Stepped, Warned, WorkersBegun
from pipeline.run.state import Run
from pipeline.settings.config import Config, parse_config
from pipeline.train import memory
from pipeline.train.session import open_session
from pipeline.train.world import (
    choose_device,
    collective_timeout,
    configure_process,
    current_world,
    lost_touch,
    watched,
)

KINDS: tuple[type[Exception], ...] = (Away, UserError, Lost, RunStopped)  # the narrower first


def worker(job: dict[str, Any]) -> None:
    """What Ray runs on each worker. A failure that would repeat is reported to the driver, and ends the training."""
    import ray
    import ray.train

    config = parse_config(job["config"])
    configure_process(config.threads, config.reproducible)
    context = ray.train.get_context()
    board, rank, stage = job["board"], context.get_world_rank(), job["work"].stage

    def progress(event: Event) -> None:
        if rank == 0 or isinstance(event, Paced | Busy):  # each rank's own
            board.push.remote(event)

    def hung(found: str) -> None:
        """End this process, which waits within torch: Ray then ends the others, too."""
        ray.get(board.hang.remote(found))
        os._exit(1)

    def leaving() -> bool:
        return job["watched"] and ray.train.get_preemption_info() is not None

    attempt, reason = ray.get(board.begin.remote(rank))
    if reason is not None:
        return  # Ray started the group again after the failure below
    progress(WorkersBegun(stage, attempt, context.get_world_size()))
    run = Run(job["root"], job["fence"], job["token"])

    def tell(text: str) -> None:
        board.push.remote(Warned(f"rank {rank}: {text}"))

    try:
        with log.kept(run, log.rank_name(run, stage, attempt, rank), tell, rank, attempt) as kept:
            heard = kept.hearing(progress, without=(Stepped, Paced))  # the driver's log has them
            warnings.showwarning = lambda message, *_, **__: heard(Warned(str(message)))
            device = choose_device(config.device, context.get_local_rank())
            if device.type == "cuda":
                torch.cuda.set_device(device)
            elsewhere = context.get_local_rank() == 0 and machine.node() != job["driver"]  # which watches its own
            with (
                watched(current_world(device), stage, config.cluster.hang_seconds, hung) as world,
                machines.watched(progress, elsewhere and config.tracking.watches_machines),
            ):
                job["work"].do(open_session(config, world, run, heard, leaving))
    except Leaving as error:
        progress(Warned(f"a node is about to be taken away; {error}, and the training goes on elsewhere"))
        ray.get(board.leave.remote())
    except (UserError, RunStopped) as error:
        ray.get(board.end.remote({"kind": kind_of(error).__name__, "message": str(error)}))
        if context.get_world_size() > 1 and not isinstance(error, Agreed):
            raise  # this rank may be alone with it: Ray ends the others, which wait for this one
    except Exception as error:
        if not may_pass(error):
            kind = UserError if memory.lacks(error) else RunStopped
            ray.get(board.end.remote({"kind": kind.__name__, "message": would_repeat(stage, error)}))
        raise


def may_pass(error: Exception) -> bool:
    """Whether another try may end better: this process lost touch with another one, or with its device."""
    return lost_touch(error) or losses.is_rays(error) or isinstance(error, torch.AcceleratorError)


def would_repeat(stage: str, error: Exception) -> str:
    """What a person is told of an error that every try would meet."""
    said = memory.said(error) if memory.lacks(error) else blame.text(error)
    return f"{stage}: {said}; {losses.NOT_AGAIN}"


def train(ray: Any, work: Work, config: Config, run: Run, progress: Progress) -> None:
    """Do the work of a stage on cluster.workers Ray Train workers; start them again if they left a node being taken
    away, or were lost.

    Raises UserError or RunStopped as the workers did, or when there is no room for them for cluster.wait_seconds.
    """
    with Board(ray, progress) as board:
        job = {
            "work": work,
            "config": config.model_dump(mode="json"),
            "root": run.root,
            "fence": run.fence,
            "token": run.token,
            "board": board.actor,
            "driver": machine.node(),
            "watched": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0",
        }
        carry_out(ray, job, config, run, progress)


def carry_out(ray: Any, job: dict[str, Any], config: Config, run: Run, progress: Progress) -> None:
    """Trainings of Ray Train's, one after the other, until the work is done. Raises as `train` does."""
    stage, board = job["work"].stage, job["board"]
    tries, written = Tries(config.cluster.max_failures, "checkpoint"), Written(run, stage)
    while True:
        failure = fit(ray, job, config, run)
        ended = ray.get(board.ended.remote())
        if ended is not None:
            raise next(kind for kind in KINDS if kind.__name__ == ended["kind"])(ended["message"])
        if failure is None:
            if ray.get(board.left.remote()):
                continue
            return
        reason = getattr(failure, "controller_failure", None)
        if isinstance(reason, NoRoom):
            raise Away(f"{stage}: {reason}") from failure
        said, remedy = describe(failure, ray.get(board.hung.remote()))
        if not tries.again(progressed=written.more()):
            stopped = Lost if losses.is_loss(failure) else RunStopped
            raise stopped(f"{stage}: {said}; {tries.said()}. {remedy}The same command goes on") from failure
        progress(Warned(f"{stage}: {said}; trying again from the last checkpoint ({tries.count} of {tries.most})"))


def describe(failure: Exception, hung: str | None) -> tuple[str, str]:
    """What a person is told of a training that was lost, and what to do, or nothing."""
    if hung is not None:
        return hung, ""
    failed = getattr(failure, "worker_failures", None)
    if failed:
        memory_ran_out = any(losses.is_memory(error) for error in failed.values())
        return losses.of_group(failed), f"To mend it, {losses.REMEDIES}. " if memory_ran_out else ""
    cause = getattr(failure, "controller_failure", failure)
    if losses.is_rays(cause):
        memory_ran_out = losses.is_memory(cause)
        return (
            f"Ray Train's controller, a process on the driver's machine, was lost: {losses.told(cause)}",
            f"To mend it, {losses.REMEDIES}. " if memory_ran_out else "",
        )
    return f"Ray Train could not go on: {losses.told(cause)}", ""


def kind_of(error: Exception) -> type[Exception]:
    """As what an error of a worker is raised by the driver."""
    return next(kind for kind in KINDS if isinstance(error, kind))


def fit(ray: Any, job: dict[str, Any], config: Config, run: Run) -> Exception | None:
    """One training of Ray Train's; returns why it failed, if it did."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from cluster.group import ProcessGroup, Trainer
    from cluster.patience import Patience

    wanted = config.cluster
    resources = {"CPU": wanted.cpus_per_worker}
    if wanted.gpus_per_worker:
        resources["GPU"] = wanted.gpus_per_worker
    name = f"{config.name}-{job['work'].stage}-{uuid.uuid4().hex[:8]}"
    with connect.ray_folder(run, name) as folder:
        trainer = Trainer(
            partial(worker, job),  # not as the loop's settings: the controller would load those, and torch with them
            backend_config=ProcessGroup(
                backend="nccl" if wanted.gpus_per_worker else "gloo",
                timeout_s=int(collective_timeout(wanted.hang_seconds).total_seconds()),
            ),
            scaling_config=ScalingConfig(
                num_workers=wanted.workers,
                use_gpu=wanted.gpus_per_worker > 0,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=wanted.resize_seconds,
                placement_strategy=wanted.placement.upper(),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=folder,
                # Losses are counted by `Tries`: Ray Train would count those before the last checkpoint, too. `Patience`
                # limits how long a placement is retried: it counts seconds.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=-1),
                callbacks=[Patience(config)],
            ),
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except SystemExit as error:
            # Ray's own handler of Ctrl-C aborts the training and then leaves with code 0.
            raise KeyboardInterrupt from error
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:  # the latter: its controller is lost
            return error
        finally:
            signal.signal(signal.SIGINT, handler)
    return None
