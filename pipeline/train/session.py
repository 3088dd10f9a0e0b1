"""What every phase of a run shares in one process: settings, place, data, network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline import storage
from pipeline.base import blame
from pipeline.base.errors import UserError
from pipeline.data import loader, shards, sources
from pipeline.data.loader import Batch, EvalLoader, Split
from pipeline.data.shards import Manifest
from pipeline.network.build import FOREIGN, build_network
from pipeline.run.events import Paced, Progress
from pipeline.run.records import DataFacts
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.task.answers import Answers
from pipeline.task.feed import Feed
from pipeline.train import evaluate, memory
from pipeline.train.world import World


def staying() -> bool:
    """The `leaving` of processes whose machines are never taken away."""
    return False


@dataclass
class Session:
    """One process of a run; every rank holds an equal one.

    `leaving` says whether a machine under the ranks is about to be taken away: every rank asks it at the same steps,
    and all of them get the same answer.
    """

    config: Config
    world: World
    run: Run
    manifest: Manifest
    data_root: str
    progress: Progress
    leaving: Callable[[], bool] = staying

    def __post_init__(self) -> None:
        self._splits: dict[str, Split] = {}
        self.feed = Feed.of(self.config)

    def split(self, name: str) -> Split:
        """A part of the data: train, val or test (opened once)."""
        if name not in self._splits:
            self._splits[name] = loader.open_split(self.config.data, self.data_root, self.manifest, name)
        return self._splits[name]

    def new_model(self) -> nn.Module:
        """The network of the config on this process's device, initialised from the seed or its checkpoint."""
        model = build_network(self.config.model, self.manifest.num_classes, self.config.seed)
        check_output(model, self.config.model.factory, self.feed, self.manifest.num_classes)
        return self.feed.place(model, self.world.device)

    def evaluate(self, model: nn.Module, split: str) -> Answers:
        """Exact answers of `model` on a split.

        Raises RunStopped when too many images are unreadable, or an answer is not finite.
        """
        data = EvalLoader(self.split(split), self.config.data)
        eval_batch = f"data.eval_batch={self.config.data.eval_batch}"
        with memory.remedied(lambda: f"evaluation on rank {self.world.rank}", f"lower {eval_batch}"):
            answers = evaluate.evaluate(model, data, self.feed, self.world, self.manifest.num_classes)
        bad = int((~answers.valid).sum())
        problem = self.too_many_bad(split, bad, len(answers.valid))
        if problem is None and not np.isfinite(answers.loss[answers.valid]).all():
            problem = (
                f"the network's loss on {split} is not finite, so its weights or its inputs are not: lower the "
                "learning rate, or check the checkpoint, data.mean and data.std"
            )
        self.world.agree(problem)
        return answers

    def calibration(self, samples: int, share: bool = False) -> Iterator[Batch]:
        """`samples` train samples, without augmentation, in batches of data.eval_batch.

        Every rank gets all of them; with `share`, each rank gets its own share of them.
        """
        loader = EvalLoader(self.split("train"), self.config.data, limit=samples, seed=self.config.seed)
        return loader.batches(self.world.rank, self.world.size) if share else loader.batches(0, 1)

    def paced(self, phase: str, step: int, steps: int, pace: tuple[float, float], loss: float, lr: float) -> None:
        """Report how fast a training goes (`Paced`), with what this process has met so far.

        `pace` are images a second, and the share of the time in which data were waited for.
        """
        bad, retries = sum(len(split.bad) for split in self._splits.values()), storage.retries().total()
        speed, waiting = round(pace[0], 3), round(pace[1], 4)
        self.progress(Paced(phase, step, self.world.rank, speed, waiting, bad, retries, loss, lr, steps))

    def too_many_bad(self, split: str, bad: int, seen: int) -> str | None:
        """The problem to report when more than data.max_bad_fraction of the images could not be read."""
        limit = self.config.data.max_bad_fraction
        if bad <= limit * seen:
            return None
        named = ", ".join(f"{key} ({reason})" for key, reason in list(self.split(split).bad.items())[:5])
        return (
            f"{bad} of {seen} images of {split} are unreadable, more than data.max_bad_fraction={limit}: {named}; "
            "repair the shards (`secateur shards verify` lists them) or raise data.max_bad_fraction"
        )


def open_session(
    config: Config, world: World, run: Run, progress: Progress, leaving: Callable[[], bool] = staying
) -> Session:
    """A session on the run's shards. Raises UserError where they are missing or do not fit."""
    return Session(config, world, run, load_data(config, run), data_root(config, run), progress, leaving)


def load_data(config: Config, run: Run) -> Manifest:
    """The manifest of the run's shards. Raises UserError where they are not those that the run was made from."""
    manifest = shards.load_manifest(data_root(config, run))
    if run.has("data.json"):
        facts = run.load(DataFacts, "data.json")
        were = {"train": facts.train, "val": facts.val, "test": facts.test}
        require_same_data(config, run, manifest, facts.data, "the run", were)
    return manifest


def require_same_data(
    config: Config, run: Run, manifest: Manifest, data: str | None, what: str, were: dict[str, int] | None = None
) -> None:
    """Raise UserError if `what`, a part of the run, was made from other data than the manifest's.

    `data` is the identity of the data that it was made from, None where an older program did not write it down; `were`
    has the numbers of samples then, where they are known.
    """
    if data is None or data == manifest.identity:
        return

    def told(identity: str, sizes: dict[str, int] | None) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in (sizes or {}).items())
        return f"{identity} ({counts})" if counts else identity

    raise UserError(
        f"'{data_root(config, run)}' holds other shards than {what} in '{run.root}' was made from: the data were "
        f"{told(data, were)}, and are {told(manifest.identity, manifest.sizes)}; put the old shards back, or use "
        "another name=... for a run on these"
    )


def data_root(config: Config, run: Run) -> str:
    """Where the shards lie: the user's own, or those built for this run."""
    if sources.of(config.data).in_place:
        assert config.data.root is not None
        return config.data.root
    return run.path("shards")


def check_output(model: nn.Module, factory: str, feed: Feed, classes: int) -> None:
    """Raise UserError if the network does not take the images, or the task cannot use its output."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            output = model(feed.zeros(1))
    except FOREIGN as error:
        raise UserError(
            f"model.factory={factory} cannot take images of shape {feed.shape} (data.channels, data.size, data.size): "
            f"{' '.join(str(error).split())[:300]}{blame.place(error)}"
        ) from error
    model.train(training)
    feed.task.require_output(output, factory, classes)
