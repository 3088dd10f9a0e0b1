"""One throw-away training step and one save, to find errors that only a first step shows before a run costs anything.

The network is built anew for the step and thrown away afterwards; none of the run's random numbers is drawn.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import storage
from pipeline.base import blame
from pipeline.base.errors import Away, UserError
from pipeline.base.names import few
from pipeline.data.loader import Batch
from pipeline.network.build import FOREIGN, build_network
from pipeline.network.weights import load_weights
from pipeline.prune import masks as masking
from pipeline.settings.config import Config
from pipeline.settings.data import Data
from pipeline.settings.training import Retrain, Train
from pipeline.task.feed import Feed
from pipeline.train import checkpoint, memory, recipe
from pipeline.train.gradients import Gradients, computed, of_compiler
from pipeline.train.session import Session
from pipeline.train.world import World

SAMPLES = 2  # in a step without data: batch norm needs more than one


@dataclass(frozen=True)
class Tries:
    """How many steps are tried, and the seconds that each took.

    After two, of which the first is always slow, none is begun once those before took `patience_s` seconds.
    """

    steps: int = 1
    patience_s: float = math.inf
    taken: list[float] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether no more is to be begun."""
        return len(self.taken) >= self.steps or (len(self.taken) >= 2 and sum(self.taken) >= self.patience_s)


def trainings(dense: Train, retrain: Retrain) -> dict[str, Train]:
    """The trainings that a run makes, by the name of their settings."""
    found = {"dense": dense, "retrain": recipe.resolve(retrain, dense)}
    return {name: settings for name, settings in found.items() if settings.epochs}


def zeros(data: Data, samples: int = SAMPLES) -> Batch:
    """A batch of black images of class 0, for a step before there are shards."""
    numbers = torch.arange(samples)
    images = torch.zeros(samples, data.channels, data.size, data.size, dtype=torch.uint8)
    return Batch(images, torch.zeros_like(numbers), torch.ones(samples), numbers)


def real(session: Session, samples: int) -> Batch:
    """`samples` train images of the run, or all if there are fewer, without augmentation."""
    batches = [*session.calibration(samples)]
    parts = ("images", "labels", "weights", "indices")
    return Batch(*(torch.cat([getattr(batch, part) for batch in batches]) for part in parts))


def on_workers(session: Session, phase: str) -> None:
    """On every rank, try a step of each training with its share of a real batch, unless `phase` has begun already.

    Raises Agreed, on every rank, with the error of the lowest rank that failed.
    """
    begun, run, config = None, session.run, session.config
    if session.world.first:
        begun = b"yes" if run.has(phase, "metrics.json") or storage.list_folders(run.path(phase, "steps")) else b""
    if session.world.broadcast(begun):
        return
    both = trainings(config.dense, config.retrain).values()
    sizes = [settings.batch_size // settings.accumulate for settings in both]
    problem = None
    try:
        batch = real(session, max([SAMPLES, *(size // session.world.size for size in sizes)]))
        require(config, session.manifest.num_classes, batch, session.world.device)
    except Away:
        raise  # no mistake, so nothing to agree on: this rank's end ends the others
    except UserError as error:
        problem = str(error)
    session.world.agree(problem)


def require(config: Config, classes: int, batch: Batch, device: torch.device) -> None:
    """Make one step of each training on `batch`, and save and load the network once.

    Raises UserError if a step fails, if no parameter gets a gradient (with several workers: if any gets none), or if
    the saved network cannot be loaded.
    """
    for name, settings in trainings(config.dense, config.retrain).items():
        network = attempt(config, name, settings, classes, batch, device)
        without = [key for key, value in network.named_parameters() if value.requires_grad and value.grad is None]
        if without and config.cluster.max_workers > 1:
            raise UserError(
                f"model.factory={config.model.factory}: {few(without)} gets no gradient, and the workers of "
                f"cluster.workers={config.cluster.workers} wait for one from each parameter: set requires_grad=False "
                "there, take it out of the network, or set cluster.workers=1"
            )
    untouched = build_network(config.model.model_copy(update={"checkpoint": None}), classes, config.seed)
    _save_and_load(Feed.of(config).place(untouched, device), f"model.factory={config.model.factory}")


def attempt(
    config: Config, name: str, settings: Train, classes: int, batch: Batch, device: torch.device,
    tries: Tries | None = None,
) -> nn.Module:  # fmt: skip
    """A new network after steps of the training of this name, half pruned; one step unless `tries` says otherwise.

    Raises UserError where one fails.
    """
    feed, factory = Feed.of(config), f"model.factory={config.model.factory}"

    def new() -> nn.Module:
        return feed.place(build_network(config.model, classes, config.seed), device)

    network = new()
    teacher = new().eval() if isinstance(settings, Retrain) and settings.distill else None
    try:
        with memory.remedied(lambda: f"the first step of {name}", memory.of_training(name, settings)):
            gradients = Gradients(feed, settings, teacher, World(0, 1, device))
            _steps(network, computed(network, config.compile), factory, gradients, batch, tries or Tries())
    except FOREIGN as error:
        reason = (" ".join(str(error).split())[:300] or type(error).__name__) + blame.place(error)
        if of_compiler(error):
            raise UserError(
                f"compile=true: torch.compile does not take {factory}, or finds no C++ compiler: set compile=false, or "
                f"install one on the workers ({reason})"
            ) from error
        raise UserError(f"{factory} cannot be trained: the first step of {name} fails: {reason}") from error
    return network


def _steps(
    model: nn.Module, computes: nn.Module, factory: str, gradients: Gradients, batch: Batch, tries: Tries
) -> None:
    """Steps on one batch; `computes` has the parameters of the model."""
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    _require_trainable(factory, parameters)
    optimizer = recipe.make_optimizer(gradients.settings, list(model.parameters()))
    device = gradients.world.device
    weights = [value.data for value in parameters.values()]
    half = [(torch.arange(weight.numel(), device=device) % 2 == 0).view(weight.shape) for weight in weights]
    applier = masking.Applier(weights, half)
    model.train()
    given = [each.to(device) for each in (batch.images, batch.labels, batch.weights)]
    while not tries.over:
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            loss = gradients.loss(computes, *given) / len(batch.labels)
        if not loss.requires_grad:
            raise UserError(f"{factory}: no gradient reaches its parameters: they must take part in its output")
        loss.backward()
        optimizer.step()
        applier.apply()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        tries.taken.append(time.perf_counter() - began)


def _require_trainable(factory: str, parameters: dict[str, nn.Parameter]) -> None:
    """Raise UserError if no parameter can be trained, or if one is complex."""
    if not parameters:
        raise UserError(f"{factory}: every parameter has requires_grad=False, so nothing can be trained: set some free")
    for name, value in parameters.items():
        if value.is_complex():
            raise UserError(
                f"{factory}: parameter {name} is complex ({value.dtype}), which is not supported: hold its real and "
                "imaginary parts as two parameters"
            )


def _save_and_load(model: nn.Module, factory: str) -> None:
    """Save the network as a run does, and load it again. Raises UserError where that does not work."""
    other = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if other:
        raise UserError(
            f"{factory}: {few(other)} in its state_dict is no tensor, and a checkpoint holds only tensors: register it "
            "as a buffer, or leave it out of the state"
        )
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        file = Path(folder, "model.safetensors")
        save_file(checkpoint.plain_tensors(dict(model.state_dict())), file)
        load_weights(model, file)
