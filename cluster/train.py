"""Ray Train: one worker group for all that a stage does; the work itself is a `pipeline.engine.Work`.

Checkpoints live in the run directory. The next start finds them there, be it Ray's restart of a worker group or a new
driver on another cluster. Ray's own record of a training is therefore thrown away.
"""

from __future__ import annotations

import os
import signal
import threading
import uuid
import warnings
from typing import Any

import torch

from cluster import connect
from cluster.connect import NoRoom
from pipeline.base.errors import Agreed, Leaving, RunStopped, UserError
from pipeline.engine import Work
from pipeline.run.events import Event, Progress, Warned
from pipeline.run.state import Run
from pipeline.settings.config import Config, parse_config
from pipeline.train.session import open_session
from pipeline.train.world import choose_device, configure_process, current_world


def worker(job: dict[str, Any]) -> None:
    """What Ray runs on each worker. A failure that would repeat is reported to the driver, and ends the training."""
    import ray
    import ray.train

    config = parse_config(job["config"])
    configure_process(config.threads)
    context = ray.train.get_context()
    board = job["board"]

    def progress(event: Event) -> None:
        if context.get_world_rank() == 0:
            board.push.remote(event)

    def leaving() -> bool:
        return job["watched"] and ray.train.get_preemption_info() is not None

    warnings.showwarning = lambda message, *_, **__: progress(Warned(str(message)))
    if ray.get(board.begin.remote()) is not None:
        return  # Ray started the group again after the failure below
    try:
        device = choose_device(config.device, context.get_local_rank())
        if device.type == "cuda":
            torch.cuda.set_device(device)
        run = Run(job["root"], job["fence"], job["token"])
        job["work"].do(open_session(config, current_world(device), run, progress, leaving))
    except Leaving as error:
        progress(Warned(f"a node is about to be taken away; {error}, and the training goes on elsewhere"))
        ray.get(board.leave.remote())
    except (UserError, RunStopped) as error:
        ray.get(board.end.remote({"user": isinstance(error, UserError), "message": str(error)}))
        if context.get_world_size() > 1 and not isinstance(error, Agreed):
            raise  # this rank may be alone with it: Ray ends the others, which wait for this one


def train(ray: Any, work: Work, config: Config, run: Run, progress: Progress) -> None:
    """Do the work of a stage on cluster.workers Ray Train workers; start them again if they left a node being taken
    away.

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
            "watched": os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0",
        }
        failure = fit(ray, job, config, run)
        while failure is None and ray.get(board.actor.left.remote()):
            failure = fit(ray, job, config, run)
        ended = ray.get(board.actor.ended.remote())
    if ended is not None:
        raise UserError(ended["message"]) if ended["user"] else RunStopped(ended["message"])
    if failure is not None:
        reason = getattr(failure, "controller_failure", None)
        if isinstance(reason, NoRoom):
            raise UserError(f"{work.stage}: {reason}") from failure
        raise RunStopped(
            f"{work.stage}: training failed after cluster.max_failures={config.cluster.max_failures} retries: {failure}"
        ) from failure


def fit(ray: Any, job: dict[str, Any], config: Config, run: Run) -> Exception | None:
    """One training of Ray Train's, with its restarts; returns why it failed, if it did."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from cluster.patience import Patience

    wanted = config.cluster
    resources = {"CPU": wanted.cpus_per_worker}
    if wanted.gpus_per_worker:
        resources["GPU"] = wanted.gpus_per_worker
    name = f"{config.name}-{job['work'].stage}-{uuid.uuid4().hex[:8]}"
    with connect.ray_folder(run, name) as folder:
        trainer = TorchTrainer(
            worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if wanted.gpus_per_worker else "gloo"),
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
                # `Patience` limits how long a placement is retried: it counts seconds.
                failure_config=FailureConfig(max_failures=wanted.max_failures, controller_failure_limit=-1),
                callbacks=[Patience(config)],
            ),
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit()
        except SystemExit as error:
            # Ray's own handler of Ctrl-C aborts the training and then leaves with code 0.
            raise KeyboardInterrupt from error
        except ray.train.TrainingFailedError as error:
            return error
        finally:
            signal.signal(signal.SIGINT, handler)
    return None


class Board:
    """Events from rank 0 to the driver: a small actor that is read every half second."""

    def __init__(self, ray: Any, progress: Progress) -> None:
        self.ray, self.progress = ray, progress
        self.actor = ray.remote(num_cpus=0)(_Events).options(scheduling_strategy=connect.here(ray)).remote()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Board:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self.ray.kill(self.actor)

    def _poll(self) -> None:
        while True:
            last = self._stop.wait(0.5)
            try:
                for event in self.ray.get(self.actor.take.remote(), timeout=60):
                    self.progress(event)
            except self.ray.exceptions.GetTimeoutError:
                continue  # a busy machine; the events wait in the actor
            except self.ray.exceptions.RayError:
                return  # The cluster is going away; the training says why.
            if last:
                return


class _Events:
    """The actor's state: events not yet taken."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reason: dict[str, Any] | None = None
        self.going = False

    def begin(self) -> dict[str, Any] | None:
        """Called first by each rank: why a rank ended, if one did. Ranks that had left are back."""
        self.going = False
        return self.reason

    def leave(self) -> None:
        """Note that the ranks leave a node that is taken away."""
        self.going = True

    def left(self) -> bool:
        """Whether the ranks left a node, and have work to continue."""
        return self.going

    def end(self, reason: dict[str, Any]) -> None:
        """Note why a rank ended; the first reason stands."""
        self.reason = self.reason or reason

    def ended(self) -> dict[str, Any] | None:
        """Why a rank ended, if one did."""
        return self.reason

    def push(self, event: Event) -> None:
        self.events.append(event)

    def take(self) -> list[Event]:
        taken, self.events = self.events, []
        return taken
