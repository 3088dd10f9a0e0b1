"""Ray Tune: the sensitivity scan, one trial a tensor, or a group of channels.

Each level is reported as soon as it is measured.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import connect, losses
from pipeline.base import blame
from pipeline.base.errors import Away, Lost, RunStopped, UserError
from pipeline.data.loader import Batch
from pipeline.engine import Levels, OnLevel, Together
from pipeline.network.build import build_network
from pipeline.network.groups import Groups
from pipeline.prune.budget import Keep
from pipeline.run.events import unheard
from pipeline.run.records import Difference, Figures, Level
from pipeline.run.state import Run
from pipeline.scan import levels
from pipeline.scan.inputs import ScanInputs, scan_inputs
from pipeline.scan.together import measure
from pipeline.settings.config import Config, parse_config
from pipeline.task.answers import Answers
from pipeline.task.feed import Feed
from pipeline.train import memory
from pipeline.train.session import open_session
from pipeline.train.world import World, choose_device, configure_process

PAUSE_S = 1.0  # between two looks for room
SMALLER = "lower data.eval_batch or prune.statistics_samples, or add memory"
MORE_ROOM = "let fewer trials run side by side (raise cluster.cpus_per_trial), or lower data.eval_batch"


def scan(ray: Any, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
    """Measure the missing levels of each tensor in parallel. Returns the figures of the network as given.

    Weights and val images (uint8) go through the object store once, and so do the levels that each tensor has already:
    a trial takes those of its own tensor. The network's own answers are computed once, by a task with a trial's
    resources. A trial's process is reused for the next tensor, so it keeps the network. Raises RunStopped for a trial
    that fails by itself, and Lost for one that is lost more than cluster.max_failures times between two levels.
    """
    shared, most = in_store(ray, config, run, source), config.cluster.max_failures
    dense: Answers = finished(ray, as_task(ray, config, answer).remote(shared), "the network as it is", config)
    known = {name: [*given] for name, given in todo.items()}
    tries = {name: losses.Tries(most, "level") for name in todo}

    def collect(name: str, level: Level) -> None:
        known[name].append(level)
        on_level(name, level)

    while todo:
        before = {name: len(known[name]) for name in todo}
        failed = trials(ray, {name: [*known[name]] for name in todo}, config, run, collect, shared, dense)
        for name, error in failed.items():
            said = f"scan: the trial of {name} was lost: {losses.told(error)}"
            if not tries[name].again(progressed=len(known[name]) > before[name]):
                remedy = f"To mend it, {MORE_ROOM}. " if losses.is_memory(error) else ""
                stopped = Lost if losses.is_loss(error) else RunStopped
                raise stopped(f"{said}; {tries[name].said()}. {remedy}The same command goes on")
            warnings.warn(f"{said}; trying again from its last level ({tries[name].count} of {most})", stacklevel=2)
        todo = {name: todo[name] for name in failed}
    return dense.figures()


def trials(
    ray: Any, todo: Levels, config: Config, run: Run, on_level: OnLevel, shared: Any, dense: Answers
) -> dict[str, Exception]:
    """One trial for each tensor, in parallel; returns those that were lost, each with Ray's error.

    Raises RunStopped for a trial that failed in a way that would repeat.
    """
    from ray import tune

    name = f"{config.name}-scan-{uuid.uuid4().hex[:8]}"
    known = {tensor: ray.put(levels) for tensor, levels in todo.items() if levels}
    trial = tune.with_parameters(make_trial(ray, tune), shared=[shared], dense=dense, known=known)
    collector = make_collector(tune, on_level, Room(ray, config))
    with connect.ray_folder(run, name) as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": config.cluster.cpus_per_trial, "GPU": config.cluster.gpus_per_trial}),
            param_space={"tensor": tune.grid_search(list(todo))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=folder,
                verbose=0,
                callbacks=[collector],
                # A level is kept by the driver as soon as it is reported, so a trial needs no checkpoint of its own.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                # `scan` counts losses: Tune would count those before the last level, too, and measure levels again.
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        results = tuner.fit()
    collector.raise_error()
    failed = {}
    for tensor, result in zip(todo, results, strict=True):  # a trial that was lost before its first level has no config
        assert result.config is None or result.config["tensor"] == tensor
        if result.error is not None:
            require_loss(result.error, f"scan: {tensor}")
            failed[tensor] = result.error
    return failed


def require_loss(error: Exception, what: str) -> None:
    """Raise UserError or RunStopped for an error that every try would meet: only lost processes are replaced."""
    from ray.exceptions import RayTaskError

    cause = getattr(error, "cause", None) or error
    while isinstance(cause, RayTaskError):  # of a task whose result it takes
        cause = cause.cause
    if isinstance(cause, UserError | RunStopped):
        raise type(cause)(str(cause)) from error
    if memory.lacks(cause):
        raise UserError(f"{what}: {memory.said(cause, SMALLER)}; {losses.NOT_AGAIN}") from error
    if not losses.is_rays(error):
        raise RunStopped(f"{what} could not be measured: {blame.text(cause)}; {losses.NOT_AGAIN}") from error


def together(ray: Any, config: Config, run: Run, source: str) -> Together:
    """A function that measures allocations of all tensors in parallel, each as a task with a trial's resources.

    It raises RunStopped when a task keeps failing.
    """
    shared = in_store(ray, config, run, source)
    dense = as_task(ray, config, answer).remote(shared)
    task = as_task(ray, config, answer_pruned)

    def measured(keeps: Sequence[Keep]) -> Iterator[Difference]:
        for started in [task.remote(shared, dense, keep) for keep in keeps]:
            yield finished(ray, started, "the network with all tensors pruned", config)

    return measured


def as_task(ray: Any, config: Config, function: Callable[..., Any]) -> Any:
    """A function as a Ray task with a trial's resources."""
    reserved = {"num_cpus": config.cluster.cpus_per_trial, "num_gpus": config.cluster.gpus_per_trial}
    return ray.remote(**reserved, max_retries=config.cluster.max_failures)(function)


def in_store(ray: Any, config: Config, run: Run, source: str) -> Any:
    """A reference to the `Shared` of a scan. A task makes it, so that val is never in the driver's memory.

    Each node holds it once. It is made on the driver's node, so it is lost only with the driver: made again elsewhere,
    it would need room while the trials that wait for it hold all there is. It reserves nothing itself.
    """
    make = ray.remote(num_cpus=0, max_retries=config.cluster.max_failures)(shared_inputs)
    return make.options(scheduling_strategy=connect.here(ray)).remote(config, run, source)


class Room:
    """Whether the cluster has room for a trial; a scan that has none would wait forever."""

    def __init__(self, ray: Any, config: Config) -> None:
        self._ray, self._config = ray, config
        self._looked = -PAUSE_S
        self._waiting = connect.Waiting(config.cluster.wait_seconds)

    def look(self) -> None:
        """Raise Away, naming what is missing, where no node could hold a trial for cluster.wait_seconds."""
        now = time.monotonic()
        if now - self._looked < PAUSE_S:
            return
        self._looked = now
        problem = connect.trial_shortage(connect.nodes(self._ray), self._config)
        if self._waiting.too_long(lacking=problem is not None):
            raise Away(f"scan: {self._waiting.said(str(problem))}")


def finished(ray: Any, started: Any, what: str, config: Config) -> Any:
    """What a task returns. Raises UserError, RunStopped or Lost if it failed for good, Away where there is no room."""
    room, most = Room(ray, config), config.cluster.max_failures
    while not ray.wait([started], timeout=PAUSE_S)[0]:
        room.look()
    try:
        return ray.get(started)
    except ray.exceptions.RayError as error:
        require_loss(error, f"scan: {what}")
        remedy = f"To mend it, {MORE_ROOM}. " if losses.is_memory(error) else ""
        raise (Lost if losses.is_loss(error) else RunStopped)(
            f"scan: {what} could not be measured: {losses.told(error)}; tried {most + 1} times "
            f"(cluster.max_failures={most}). {remedy}The same command goes on"
        ) from error


@dataclass(frozen=True, eq=False)
class Shared:
    """ScanInputs as NumPy arrays and plain values, for the object store: processes on a node read them without a copy.

    `classes` is the size of the label space, which the network is built for.
    """

    config: dict[str, Any]
    classes: int
    weights: dict[str, NDArray[Any]]
    batches: list[tuple[NDArray[Any], ...]]
    alive: dict[str, NDArray[Any]]
    calibration: list[tuple[NDArray[Any], ...]]
    statistics: dict[str, NDArray[Any]]
    groups: Groups | None


def shared_inputs(config: Config, run: Run, source: str) -> Shared:
    """What every trial needs; read where this is called."""
    configure_process(config.threads, config.reproducible)
    opened = open_session(config, World(0, 1, torch.device("cpu")), run, unheard)
    given = scan_inputs(opened, source)
    return Shared(
        config=config.model_dump(mode="json"),
        classes=opened.manifest.num_classes,
        weights={name: tensor.cpu().numpy() for name, tensor in given.model.state_dict().items()},
        batches=[_arrays(batch) for batch in given.batches],
        alive={name: mask.numpy() for name, mask in given.alive.items()},
        calibration=[_arrays(batch) for batch in given.calibration],
        statistics={name: statistic.numpy() for name, statistic in given.statistics.items()},
        groups=given.groups,
    )


def trial_inputs(shared: Shared) -> ScanInputs:
    """The shared inputs in a process of Ray's, on its device."""
    config = parse_config(shared.config)
    configure_process(config.threads, config.reproducible)
    device = choose_device(config.device)
    model = build_network(config.model, shared.classes, config.seed)
    feed = Feed.of(config)
    # Arrays of the object store are read-only, and weights are changed in place: copied once here.
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in shared.weights.items()})
    return ScanInputs(
        scan=config.scan,
        prune=config.prune,
        feed=feed,
        device=device,
        model=feed.place(model, device),
        batches=[Batch(*map(_readonly_tensor, arrays)) for arrays in shared.batches],
        alive={name: _readonly_tensor(mask) for name, mask in shared.alive.items()},
        calibration=[Batch(*map(_readonly_tensor, arrays)) for arrays in shared.calibration],
        statistics={name: _readonly_tensor(array).to(device) for name, array in shared.statistics.items()},
        groups=shared.groups,
    )


def answer(shared: Shared) -> Answers:
    """The network's own answers, to which every level is compared."""
    return trial_inputs(shared).answers()


def answer_pruned(shared: Shared, dense: Answers, keep: Keep) -> Difference:
    """How the network answers with all tensors pruned so far, against its own answers."""
    (found,) = measure(trial_inputs(shared), dense, [keep])
    return found


def make_trial(ray: Any, tune: Any) -> type:
    """The trainable; made in a function since its base class needs Ray."""

    class ScanTrial(tune.Trainable):
        """One tensor; a step reports one level, the last step none."""

        def setup(self, params: dict[str, Any], shared: list[Any], dense: Answers, known: dict[str, Any]) -> None:
            self.given, self.dense, self.known = trial_inputs(ray.get(shared[0])), dense, known
            self.reset_config(params)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.tensor = new_config["tensor"]
            measured = ray.get(self.known[self.tensor]) if self.tensor in self.known else ()
            self.levels = levels.scan_part(self.given, self.dense, self.tensor, measured)
            return True

        def step(self) -> dict[str, Any]:
            level = next(self.levels, None)
            return {"tensor": self.tensor, "level": level and level.to_json(), "done": level is None}

    return ScanTrial


def make_collector(tune: Any, on_level: OnLevel, room: Room) -> Any:
    """A Tune callback on the driver that hands each level on as it arrives, and looks for room.

    What it raises while Tune handles a result would come out as an error of Tune's, so it is raised at the next step.
    """

    class Collector(tune.Callback):
        def __init__(self, hand_on: OnLevel | None, look: Callable[[], None] | None) -> None:
            self.hand_on, self.look = hand_on, look
            self.error: UserError | RunStopped | None = None

        def __getstate__(self) -> dict[str, Any]:
            # Tune pickles its callbacks; this one lives in this process only.
            return {"hand_on": None, "look": None, "error": None}

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if self.hand_on is None or self.error is not None or result["level"] is None:
                return
            try:
                self.hand_on(result["tensor"], Level.from_json(result["level"], "a trial of the scan"))
            except (UserError, RunStopped) as error:
                self.error = error

        def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
            self.raise_error()
            if self.look is not None:
                self.look()

        def raise_error(self) -> None:
            if self.error is not None:
                raise self.error

    return Collector(on_level, room.look)


def _arrays(batch: Batch) -> tuple[Any, ...]:
    return tuple(part.contiguous().numpy() for part in (batch.images, batch.labels, batch.weights, batch.indices))


def _readonly_tensor(array: Any) -> torch.Tensor:
    """A tensor on an array's memory, which is only read: torch's warning on read-only arrays is not for us."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
