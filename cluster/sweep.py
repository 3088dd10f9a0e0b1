"""Ray Tune: the sensitivity scan, one trial a tensor, its levels reported as they are known."""

from __future__ import annotations

import uuid
import warnings
from typing import Any

import numpy as np
import torch

from cluster import connect
from pipeline import config as settings
from pipeline import models
from pipeline.config import Config
from pipeline.data.loader import Batch
from pipeline.distributed import World, choose_device, configure_process
from pipeline.engine import OnLevel, Trials
from pipeline.errors import RunStopped
from pipeline.local import scan_inputs
from pipeline.prune import sensitivity
from pipeline.session import open_session, place
from pipeline.state import Run

DENSE = "(dense)"  # the trial that measures the network as it is


def scan(ray: Any, todo: Trials, config: Config, run: Run, on_level: OnLevel) -> dict[str, float]:
    """Measure the missing levels of each tensor in parallel. Returns the dense network's figures.

    Weights and val images (uint8) go through the object store once; a trial's process is reused for the
    next tensor, so it keeps the network. Raises RunStopped when trials keep failing.
    """
    from ray import tune

    name = f"{config.name}-scan-{uuid.uuid4().hex[:8]}"
    trial = tune.with_parameters(make_trial(tune), shared=shared_inputs(config, run))
    collector = make_collector(tune, on_level)
    with connect.ray_folder(run, name) as folder:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": config.cluster.cpus_per_trial, "GPU": config.cluster.gpus_per_trial}),
            param_space={"tensor": tune.grid_search([DENSE, *todo]), "levels": todo},
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(
                name=name,
                storage_path=folder,
                verbose=0,
                callbacks=[collector],
                # A level is kept by the driver as soon as it is reported, so a trial needs no checkpoint of its own.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        results = tuner.fit()
    if results.errors:
        raise RunStopped(f"scan: {len(results.errors)} trials failed: {str(results.errors[0]).splitlines()[-1]}")
    assert collector.dense is not None
    return dict(collector.dense)


def shared_inputs(config: Config, run: Run) -> dict[str, Any]:
    """What every trial needs, as NumPy arrays, which actors on a node read without a copy."""
    opened = open_session(config, World(0, 1, torch.device("cpu")), run, lambda event: None)
    model, batches = scan_inputs(opened)
    return {
        "config": config.model_dump(mode="json"),
        "classes": opened.manifest.num_classes,
        "weights": {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()},
        "batches": [
            tuple(part.numpy() for part in (batch.images, batch.labels, batch.weights, batch.indices))
            for batch in batches
        ],
    }


def make_trial(tune: Any) -> type:
    """The trainable; made in a function since its base class needs Ray."""

    class ScanTrial(tune.Trainable):
        """One tensor; a step measures one level."""

        def setup(self, params: dict[str, Any], shared: dict[str, Any]) -> None:
            self.settings = settings.parse(shared["config"])
            configure_process(self.settings)
            self.device = choose_device(self.settings)
            model = models.build(self.settings.model, shared["classes"], self.settings.seed)
            # Arrays of the object store are read-only, and weights are changed in place: copied once here.
            model.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in shared["weights"].items()})
            self.model = place(model, self.settings, self.device)
            self.batches = [Batch(*map(_readonly_tensor, arrays)) for arrays in shared["batches"]]
            self.reset_config(params)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.tensor = new_config["tensor"]
            densities = [level["density"] for level in new_config["levels"].get(self.tensor, [])]
            self.remaining = len(densities)
            self.levels = sensitivity.scan_tensor(
                self.model, self.tensor, densities, self.batches, self.settings, self.device
            )
            return True

        def step(self) -> dict[str, Any]:
            if self.tensor == DENSE:
                found = sensitivity.accuracy(self.model, self.batches, self.settings, self.device)
                return {"tensor": DENSE, "level": found, "done": True}
            level = sensitivity.as_dict(next(self.levels))
            self.remaining -= 1
            if self.remaining == 0:
                self.levels.close()  # puts the tensor back
            return {"tensor": self.tensor, "level": level, "done": self.remaining == 0}

        def cleanup(self) -> None:
            self.levels.close()

    return ScanTrial


def make_collector(tune: Any, on_level: OnLevel) -> Any:
    """A Tune callback on the driver that hands each level on as it arrives."""

    class Collector(tune.Callback):
        def __init__(self, hand_on: OnLevel | None) -> None:
            self.hand_on = hand_on
            self.dense: dict[str, float] | None = None

        def __getstate__(self) -> dict[str, Any]:
            return {"hand_on": None, "dense": None}  # Tune pickles its callbacks; this one lives in this process only

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            if result["tensor"] == DENSE:
                self.dense = result["level"]
            elif self.hand_on is not None:
                self.hand_on(result["tensor"], result["level"])

    return Collector(on_level)


def _readonly_tensor(array: Any) -> torch.Tensor:
    """A tensor on an array's memory, which is only read: torch's warning on read-only arrays is not for us."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
