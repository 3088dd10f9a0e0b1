"""Phases: what is held fixed stays to the bit, a stop changes nothing, and DDP follows."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import Attending
from small import network
from torch import Tensor, nn

from pipeline.base.errors import UserError
from pipeline.run.events import unheard
from pipeline.run.state import Run
from pipeline.settings.config import parse_config
from pipeline.train import phases
from pipeline.train.loop import Training
from pipeline.train.session import Session, open_session
from pipeline.train.world import current_world

THREE = {"phases": ("fc", "conv", "all"), "epochs": 1, "steps": 10, "weight_decay": 0.01, "checkpoint_steps": 2}


class Watched(Training):
    """Keeps the parameters and gradients of each update; stops, as if killed, before update `stop`."""

    stop: int | None = None

    def fit(self) -> Any:
        self.seen = [self._now()]
        self.came: list[dict[str, Tensor]] = []
        return super().fit()

    def _update(self, wrapped: nn.Module, batch: Any) -> None:
        if self.position.step == self.stop:
            raise KeyboardInterrupt
        super()._update(wrapped, batch)
        self.seen.append(self._now())
        given = {name: parameter.grad for name, parameter in self.parameters.items()}
        self.came.append({name: grad.clone() for name, grad in given.items() if grad is not None})

    def _now(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def training(session: Session, name: str, masks: dict[str, Tensor] | None = None, **changes: Any) -> Watched:
    """A retraining in a folder of its own, with the batches that all have, of a new network."""
    model = session.new_model()
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    recipe = session.config.retrain.model_copy(update={**THREE, **changes})
    return Watched(session, model, recipe, f"rounds/{name}", "rounds/01", names, masks)


def masks_of(model: nn.Module, density: float) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=source) < density for n, p in model.named_parameters() if p.ndim > 1}


def changed(seen: list[dict[str, Tensor]], first: int, last: int) -> set[str]:
    """Parameters that are not the same to the bit after updates `first` to `last`."""
    before = seen[first]
    return {name for now in seen[first : last + 1] for name in now if not torch.equal(now[name], before[name])}


def test_phases_share_the_steps_and_the_rest_goes_to_the_last() -> None:
    assert [phases.at(step, 10, 3) for step in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [phases.first_step(phase, 10, 3) for phase in range(3)] == [0, 3, 6]
    assert [phases.at(step, 2, 3) for step in range(2)] == [0, 1]
    assert [phases.at(step, 4, 1) for step in range(4)] == [0] * 4


def test_a_norm_goes_with_the_layer_before_it() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2), nn.LayerNorm(2))
    found = phases.kinds(model)
    assert {int(name.partition(".")[0]): kind for name, kind in found.items()} == {
        0: "conv", 1: "conv", 2: "conv", 3: "fc", 4: "fc",
    }  # fmt: skip


def test_attention_is_fully_connected() -> None:
    found = phases.kinds(Attending())
    assert found["embed.weight"] == "conv"
    assert {kind for name, kind in found.items() if name.startswith("attention.")} == {"fc"}


def test_a_phase_without_layers_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"retrain\.phases=\['fc', 'conv'\]: the network has no convolution"):
        phases.require_layers(nn.Linear(2, 2), ("fc", "conv"))


def test_what_a_phase_holds_stays_to_the_bit(small_session: Session) -> None:
    done = training(small_session, "held")
    done.fit()
    fc = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    conv = {"conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"}
    assert changed(done.seen, 0, 3) == fc
    assert changed(done.seen, 3, 6) == conv
    assert changed(done.seen, 6, 10) == fc | conv
    assert all(parameter.requires_grad for parameter in done.model.parameters())


def test_momentum_starts_anew_in_each_phase(small_session: Session) -> None:
    """The first update of a phase is that of a fresh start, -lr * (gradient + decay), also where momentum was."""
    done = training(small_session, "momentum", phases=("fc", "all"), steps=4, schedule="constant", lr=0.5)
    done.fit()
    before, after, gradients = done.seen[2], done.seen[3], done.came[2]
    for name, start in before.items():
        torch.testing.assert_close(after[name], start - 0.5 * (gradients[name] + 0.01 * start), rtol=1e-5, atol=1e-7)


def test_layers_that_the_network_itself_holds_fixed_stay_so(small_session: Session) -> None:
    model = small_session.new_model()
    weight = dict(model.named_parameters())["conv1.weight"].requires_grad_(False)
    settings = small_session.config.retrain.model_copy(update=THREE)
    done = Watched(small_session, model, settings, "rounds/own", "rounds/01", ["fc1.weight"])
    done.fit()
    assert "conv1.weight" not in changed(done.seen, 0, 10)
    assert not weight.requires_grad


@pytest.mark.parametrize(("optimizer", "stops"), [("sgd", (3, 5, 6)), ("adamw", (5,))])
def test_a_stop_in_any_phase_changes_no_bit(small_session: Session, optimizer: str, stops: tuple[int, ...]) -> None:
    """At the border of two phases (from the checkpoint before it, or on it) and within one."""
    undisturbed = training(small_session, f"{optimizer}-undisturbed", optimizer=optimizer)
    undisturbed.fit()
    expected = undisturbed.model.state_dict()
    for stop in stops:
        stopped = training(small_session, f"{optimizer}-{stop}", optimizer=optimizer)
        stopped.stop = stop
        with pytest.raises(KeyboardInterrupt):
            stopped.fit()
        resumed = training(small_session, f"{optimizer}-{stop}", optimizer=optimizer)
        resumed.fit()
        assert len(resumed.came) == 10 - 2 * (stop // 2)  # a checkpoint every 2 updates
        state = resumed.model.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


PLAIN = {"norm": False, "dropout": 0.0}


def in_two(rank: int, port: int, folder: str, config: dict[str, Any], run: Run) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    session = open_session(parse_config(config), current_world(torch.device("cpu")), run, unheard)
    done = training(session, "two", masks_of(network(**PLAIN), 0.3))
    done.fit()
    torch.save(done.seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_hold_the_same_layers_and_end_as_one(small_session: Session, tmp_path: Path) -> None:
    """DDP is made anew in each phase, with masked all-reduce over the layers of that phase."""
    plain = small_session.config.model.model_copy(update={"kwargs": PLAIN})
    session = replace(small_session, config=small_session.config.model_copy(update={"model": plain}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_two, (port, str(tmp_path), session.config.model_dump(mode="json"), session.run), nprocs=2)
    seen = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(one[name], two[name]) for one, two in zip(*seen, strict=True) for name in one)
    assert changed(seen[0], 1, 3) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert changed(seen[0], 3, 6) == {"conv1.weight", "conv1.bias"}
    assert len(changed(seen[0], 6, 10)) == 6
    alone = training(session, "one", masks_of(network(**PLAIN), 0.3))
    alone.fit()
    for name, weight in alone.seen[-1].items():
        torch.testing.assert_close(seen[0][-1][name], weight, rtol=1e-4, atol=1e-6)


def test_l1_pulls_at_prunable_weights_alone(small_session: Session) -> None:
    """One plain SGD update: with l1, each prunable weight is lr * l1 * sign(w) nearer to 0, all else as without."""
    one = {"phases": ("all",), "steps": 1, "momentum": 0.0, "lr": 0.5}
    without, pulled = training(small_session, "no-l1", **one), training(small_session, "l1", l1=0.01, **one)
    without.fit()
    pulled.fit()
    for name, start in pulled.seen[0].items():
        if start.ndim > 1:
            torch.testing.assert_close(pulled.seen[1][name], without.seen[1][name] - 0.005 * start.sign())
        else:
            assert torch.equal(pulled.seen[1][name], without.seen[1][name])


def test_a_long_gradient_is_scaled_down_and_pruned_weights_do_not_count(small_session: Session) -> None:
    """One plain SGD update of a clipped gradient moves the survivors by lr * clip_norm; a short one stays as it is."""
    one = {"phases": ("all",), "steps": 1, "momentum": 0.0, "lr": 0.5, "weight_decay": 0.0}
    masks = masks_of(small_session.new_model(), 0.3)
    free, clipped, short = (
        training(small_session, f"clip-{limit}", masks, **one, clip_norm=limit) for limit in (None, 0.01, 1e6)
    )
    for each in (free, clipped, short):
        each.fit()
    moves = {name: clipped.seen[1][name] - start for name, start in clipped.seen[0].items()}
    kept = [move[masks[name]] if name in masks else move.flatten() for name, move in moves.items()]
    assert float(torch.cat(kept).norm()) == pytest.approx(0.5 * 0.01, rel=1e-4)
    assert all(torch.equal(short.seen[1][name], weight) for name, weight in free.seen[1].items())
