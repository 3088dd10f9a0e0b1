"""Ray Tune: the sensitivity scan, one trial a tensor. Each level is reported as soon as it is measured."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster import connect
from pipeline.base.errors import Lost, RunStopped
from pipeline.data.loader import Batch
from pipeline.engine import Levels, OnLevel, Together
from pipeline.network.build import build_network
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
from pipeline.train.session import open_session
from pipeline.train.world import World, choose_device, configure_process


def scan(ray: Any, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
    """Measure the missing levels of each tensor in parallel. Returns the figures of the network as given.

    Weights and val images (uint8) go through the object store once. The network's own answers are computed once, by a
    task with a trial's resources. A trial's process is reused for the next tensor, so it keeps the network. Raises
    RunStopped when trials keep failing.
    """
    from ray import tune

    shared = ray.put(shared_inputs(config, run, source))
    dense: Answers = finished(ray, as_task(ray, config, answer).remote(shared), "the network as it is")
    if not todo:
        return dense.figures()
    name = f"{config.name}-scan-{uuid.uuid4().hex[:8]}"
    trial = tune.with_parameters(make_trial(ray, tune), shared=[shared], dense=dense, known=todo)
    with connect.ray_folder(run, name) as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": config.cluster.cpus_per_trial, "GPU": config.cluster.gpus_per_trial}),
            param_space={"tensor": tune.grid_search(list(todo))},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=folder,
                verbose=0,
                callbacks=[make_collector(tune, on_level)],
                # A level is kept by the driver as soon as it is reported, so a trial needs no checkpoint of its own.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        results = tuner.fit()
    if results.errors:
        stopped = Lost if all(connect.is_loss(ray, error) for error in results.errors) else RunStopped
        raise stopped(f"scan: {len(results.errors)} trials failed: {str(results.errors[0]).splitlines()[-1]}")
    return dense.figures()


def together(ray: Any, config: Config, run: Run, source: str) -> Together:
    """A function that measures allocations of all tensors in parallel, each as a task with a trial's resources.

    It raises RunStopped when a task keeps failing.
    """
    shared = ray.put(shared_inputs(config, run, source))
    dense = as_task(ray, config, answer).remote(shared)
    task = as_task(ray, config, answer_pruned)

    def measured(keeps: Sequence[Keep]) -> Iterator[Difference]:
        for started in [task.remote(shared, dense, keep) for keep in keeps]:
            yield finished(ray, started, "the network with all tensors pruned")

    return measured


def as_task(ray: Any, config: Config, function: Callable[..., Any]) -> Any:
    """A function as a Ray task with a trial's resources."""
    reserved = {"num_cpus": config.cluster.cpus_per_trial, "num_gpus": config.cluster.gpus_per_trial}
    return ray.remote(**reserved, max_retries=config.cluster.max_failures)(function)


def finished(ray: Any, started: Any, what: str) -> Any:
    """What a task returns. Raises RunStopped if it failed for good."""
    try:
        return ray.get(started)
    except ray.exceptions.RayError as error:
        stopped = Lost if connect.is_loss(ray, error) else RunStopped
        raise stopped(f"scan: {what} could not be measured: {str(error).splitlines()[-1]}") from error


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


def shared_inputs(config: Config, run: Run, source: str) -> Shared:
    """What every trial needs."""
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
    )


def trial_inputs(shared: Shared) -> ScanInputs:
    """The shared inputs in a process of Ray's, on its device."""
    config = parse_config(shared.config)
    configure_process(config.threads)
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

        def setup(self, params: dict[str, Any], shared: list[Any], dense: Answers, known: Levels) -> None:
            self.given, self.dense, self.known = trial_inputs(ray.get(shared[0])), dense, known
            self.reset_config(params)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.tensor = new_config["tensor"]
            self.levels = levels.scan_tensor(self.given, self.dense, self.tensor, self.known[self.tensor])
            return True

        def step(self) -> dict[str, Any]:
            level = next(self.levels, None)
            return {"tensor": self.tensor, "level": level and level.to_json(), "done": level is None}

    return ScanTrial


def make_collector(tune: Any, on_level: OnLevel) -> Any:
    """A Tune callback on the driver that hands each level on as it arrives."""

    class Collector(tune.Callback):
        def __init__(self, hand_on: OnLevel | None) -> None:
            self.hand_on = hand_on

        def __getstate__(self) -> dict[str, Any]:
            return {"hand_on": None}  # Tune pickles its callbacks; this one lives in this process only

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if self.hand_on is not None and result["level"] is not None:
                self.hand_on(result["tensor"], Level.from_json(result["level"], "a trial of the scan"))

    return Collector(on_level)


def _arrays(batch: Batch) -> tuple[Any, ...]:
    return tuple(part.numpy() for part in (batch.images, batch.labels, batch.weights, batch.indices))


def _readonly_tensor(array: Any) -> torch.Tensor:
    """A tensor on an array's memory, which is only read: torch's warning on read-only arrays is not for us."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
