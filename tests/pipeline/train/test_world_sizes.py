"""1, 2, 3 and 4 processes over gloo train the same network on the same samples, as unevenly as 3 share 8 lanes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.prune.gradual import Gradual
from pipeline.run.events import unheard
from pipeline.run.state import Run
from pipeline.settings.config import Config, parse_config
from pipeline.train.loop import Training
from pipeline.train.session import Session, open_session
from pipeline.train.world import World, configure_process

SIZES = (1, 2, 3, 4)
UNEVEN = (1, 3)
STEPS = 50
BATCH = 64


class Precise(nn.Module):
    """A network that computes in float64."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.double())
        return logits


class Recorded(Training):
    """Keeps the mean loss of each update, over all ranks; needs checkpoint_steps=1, and saves none."""

    losses: list[float]

    def _update(self, wrapped: nn.Module, batch: Batch) -> None:
        super()._update(wrapped, batch)
        self.losses.append(float(self.world.sum(self.tally.here.clone())[0]) / BATCH)

    def _save(self) -> None:
        pass


def exact(session: Session) -> dict[str, Any]:
    """50 updates without dropout and batch norm, in float64, with weights that go gradually, and a teacher.

    Returns each update's loss, and each epoch's order.
    """
    torch.manual_seed(0)
    model = Precise(small.network(norm=False, dropout=0.0))
    weight = model.network.get_parameter("fc1.weight")
    ranking = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    name = "network.fc1.weight"
    phase = f"exact-{session.world.size}"
    everything = {name: torch.ones_like(ranking, dtype=torch.bool)}
    gradual = Gradual(lambda density, alive, last: {name: ranking < density}, 0.6, 0.3, share=0.8, every=10)
    teacher = Precise(small.network(norm=False, dropout=0.0)).eval()
    settings = session.config.retrain
    training = Recorded(session, model, settings, phase, "order", [name], everything, gradual, teacher)
    training.losses, training.total = [], STEPS
    position = training.fit()
    orders = [epoch.order for epoch in position.history]
    return {"losses": training.losses, "order": [*orders, training.tally.order]}


def noisy(session: Session) -> dict[str, Any]:
    """A training with dropout and batch norm: its accuracy on val, and each epoch's order."""
    phase = f"noisy-{session.world.size}-{session.config.seed}"
    position = Training(session, session.new_model(), session.config.dense, phase, "order", []).fit()
    return {"top1": position.history[-1].val_top1, "order": [epoch.order for epoch in position.history]}


def normed(session: Session) -> dict[str, Any]:
    """An epoch with batch norm; what its layers know of the samples then."""
    model = session.new_model()
    settings = session.config.dense.model_copy(update={"epochs": 1})
    Training(session, model, settings, f"normed-{session.world.size}", "order", []).fit()
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


def process(rank: int, folder: str, configs: list[Config], run: Run, what: str, sizes: tuple[int, ...]) -> None:
    """What each process does: it takes part in every world that is large enough to have its rank."""
    torch.set_num_threads(1)
    for number, config in enumerate(configs):
        for size in sizes:
            if rank >= size:
                continue
            configure_process(config.threads)
            if size > 1:
                store = f"file://{folder}/store-{number}-{size}"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            world = World(rank, size, torch.device("cpu"))
            found = {"exact": exact, "noisy": noisy, "normed": normed}[what](open_session(config, world, run, unheard))
            Path(folder, f"{number}-{size}-{rank}.json").write_text(json.dumps(found))
            if size > 1:
                dist.destroy_process_group()


def train(
    session: Session, folder: Path, what: str, *changes: dict[str, Any], sizes: tuple[int, ...] = SIZES
) -> list[dict[int, dict[str, Any]]]:
    """For each change of the config, what rank 0 of each world size found."""
    tree = session.config.model_dump(mode="json")
    configs = [parse_config({**tree, **change}) for change in changes]
    mp.spawn(process, (str(folder), configs, session.run, what, sizes), nprocs=max(sizes))
    return [
        {size: json.loads((folder / f"{number}-{size}-0.json").read_text()) for size in sizes}
        for number in range(len(configs))
    ]


@pytest.mark.parametrize("sizes", [UNEVEN, pytest.param(SIZES, marks=pytest.mark.faults)])
def test_every_world_size_takes_the_same_updates(
    sizes: tuple[int, ...], small_session: Session, tmp_path: Path
) -> None:
    dense = small_session.config.dense.model_dump() | {
        "batch_size": BATCH, "checkpoint_steps": 1, "epochs": 4, "lr": 0.2,
    }  # fmt: skip
    settings = {**dense, "distill": 0.3, "clip_norm": 0.3}
    found, parts = train(
        small_session,
        tmp_path,
        "exact",
        {"retrain": settings},
        {"retrain": {**settings, "accumulate": 3}},
        sizes=sizes,
    )
    curves = {size: np.array(found[size]["losses"]) for size in sizes}
    assert len(curves[1]) == STEPS
    assert curves[1][-5:].mean() < 0.8 * curves[1][:5].mean()  # there is something to agree on
    assert all(found[size]["order"] == found[1]["order"] for size in sizes)
    apart = {size: float(np.abs(curves[size] - curves[1]).max()) for size in sizes[1:]}
    print(f"largest difference of a loss over {STEPS} updates, by world size: {apart}")
    assert max(apart.values()) < 1e-6
    for size in sizes:  # computed in three parts, which do not divide the shares evenly
        assert np.abs(np.array(parts[size]["losses"]) - curves[1]).max() < 1e-6
        assert parts[size]["order"] == found[1]["order"]


def test_all_ranks_measure_val_with_the_statistics_that_are_saved(small_session: Session, tmp_path: Path) -> None:
    train(small_session, tmp_path, "normed", {}, sizes=UNEVEN)
    first, *others = [json.loads((tmp_path / f"0-3-{rank}.json").read_text()) for rank in range(3)]
    assert any(name.endswith("running_mean") for name in first)
    assert others == [first, first]


@pytest.mark.faults
def test_with_dropout_and_batch_norm_the_accuracy_is_within_noise(small_session: Session, tmp_path: Path) -> None:
    dense = small_session.config.dense.model_dump() | {"epochs": 20}
    found = train(small_session, tmp_path, "noisy", *({"dense": dense, "seed": seed} for seed in range(3)))
    assert all(by_size[size]["order"] == by_size[1]["order"] for by_size in found for size in SIZES)
    top1 = np.array([[by_size[size]["top1"] for size in SIZES] for by_size in found])  # (seeds, sizes)
    mean, noise = top1.mean(0), top1.std(0, ddof=1).max()
    print(f"val accuracy by world size: {mean.round(4).tolist()}, deviation over seeds {noise:.4f}")
    assert mean.min() > 0.7
    assert np.abs(mean - mean[0]).max() < max(0.03, 2 * noise)
