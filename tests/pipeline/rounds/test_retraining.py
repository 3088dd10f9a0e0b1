"""Rounds that are retrained in a small network: whole runs, stops, two processes, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small import SMALL
from tiny_run import carry_out, equal, final_weights
from torch import Tensor, nn

from pipeline.base.errors import Agreed, UserError
from pipeline.network.groups import Groups, find
from pipeline.network.survey import survey
from pipeline.rounds import retraining
from pipeline.rounds.method import apply_masks
from pipeline.rounds.subject import Subject, open_subject
from pipeline.run.events import Event, Noted, unheard
from pipeline.run.records import RoundMetrics
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config, parse_config
from pipeline.task.feed import Feed
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.loop import Training
from pipeline.train.session import Session, open_session
from pipeline.train.world import current_world

CHANNELS: dict[str, Any] = {
    "prune.pattern": "channels", "prune.allocation": "uniform", "prune.dense_control": False, "dense.epochs": 1,
    "retrain.epochs": 1, "prune.shrink_between_rounds": True, "model": SMALL["model"],
}  # fmt: skip
PLAIN = {"factory": "small:network", "kwargs": {"norm": False, "dropout": 0.0}}


def metrics(config: Config, number: int) -> RoundMetrics:
    return Run(run_root(config), 0).load(RoundMetrics, f"rounds/{number:02d}", "metrics.json")


def test_a_run_whose_rounds_retrain_small_networks_ends_as_one_that_retrains_masked_ones(
    tiny: Callable[..., Config],
) -> None:
    no_dropout = {"factory": "small:network", "kwargs": {"dropout": 0.0}}  # it would draw other numbers
    given = CHANNELS | {"model": no_dropout, "prune.reconstruct_samples": 64, "retrain.distill": 0.3}
    events: list[Event] = []
    small, masked = tiny(**given), tiny(name="masked", **given | {"prune.shrink_between_rounds": False})
    result, expected = carry_out(small, events), carry_out(masked)
    assert result["weights_kept"] == expected["weights_kept"] <= result["weights_total"] / 6
    for layer, other in zip(result["layers"], expected["layers"], strict=True):
        assert (layer["name"], layer["kept"]) == (other["name"], other["kept"])
    assert [metrics(small, n).mask_digest for n in (1, 2)] == [metrics(masked, n).mask_digest for n in (1, 2)]
    weights, wanted = final_weights(small), final_weights(masked)
    for layer in result["layers"][:2]:  # what is removed is not active
        rows = weights[layer["name"]].flatten(1).any(1)
        assert 0 < layer["activation_density"] <= float(rows.double().mean()) < 1
    for name in ("conv1.weight", "fc1.weight", "fc2.weight", "fc2.bias"):
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-2, atol=1e-3)  # roundings grow over the steps
    said = [event.text for event in events if isinstance(event, Noted) and "retrains a network of" in event.text]
    assert len(said) == 2
    assert said[0].startswith("rounds/01 retrains a network of ")
    assert said[0].endswith("of 3,158 parameters")


def test_a_run_that_is_stopped_in_its_rounds_ends_with_the_same_bytes(
    tiny: Callable[..., Config], interrupt: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = CHANNELS | {"retrain.checkpoint_steps": 3}
    undisturbed, stopped = tiny(name="undisturbed", **given), tiny(name="stopped", **given)
    carry_out(undisturbed)
    for phase, step in (("rounds/01", 7), ("rounds/02", 5)):
        interrupt(phase, step)
        with pytest.raises(KeyboardInterrupt):
            carry_out(stopped)
        monkeypatch.undo()
    saved = checkpoint.latest(Run(run_root(stopped), 0), "rounds/02")
    assert saved is not None
    assert saved.state["step"] == 3
    assert len(saved.weights["fc1.weight"]) < 20
    assert saved.weights["fc1.weight"].shape == saved.masks["fc1.weight"].shape
    carry_out(stopped)
    assert equal(final_weights(undisturbed), final_weights(stopped))
    assert metrics(undisturbed, 2).val == metrics(stopped, 2).val


@pytest.mark.parametrize("changes", [{"optimizer": "adamw", "lr": 0.001}, {"phases": ("fc", "all"), "l1": 1e-4}])
def test_a_stop_changes_no_bit_of_what_is_put_back(
    prepared: Session, interrupt: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    recipe = prepared.config.retrain.model_copy(update=changes)
    session = dataclasses.replace(prepared, config=prepared.config.model_copy(update={"retrain": recipe}))
    undisturbed = retrained(session, "rounds/undisturbed")
    for step in (6, 11):
        interrupt("rounds/stopped", step)
        with pytest.raises(KeyboardInterrupt):
            retrained(session, "rounds/stopped")
        monkeypatch.undo()
    saved = checkpoint.latest(session.run, "rounds/stopped")
    assert saved is not None
    assert saved.state["step"] == 8
    moments = [each for name, each in saved.optimizer.items() if name.startswith("fc1.weight/") and each.ndim]
    assert {each.shape for each in moments} == {saved.weights["fc1.weight"].shape}
    assert equal(undisturbed, retrained(session, "rounds/stopped"))


def subject_of(session: Session) -> tuple[Subject, dict[str, Tensor]]:
    """The dense network, pruned to every third channel of each group, and its masks."""
    subject = open_subject(session)
    assert subject.groups is not None
    masks = subject.groups.masks({name: flags.cumsum() % 3 == 1 for name, flags in subject.groups.whole.items()})
    apply_masks(subject.model, masks)
    return subject, masks


def retrained(session: Session, folder: str) -> dict[str, Tensor]:
    """The network's tensors after a retraining of the round of this folder."""
    subject, masks = subject_of(session)
    retraining.retrain(subject, folder, "rounds/01", masks, {}, None)
    return dict(subject.model.state_dict())


@pytest.fixture
def prepared(tiny: Callable[..., Config], small_session: Session) -> Any:
    """A session of a run that has shards and a dense network, not trained."""
    config = tiny(**CHANNELS | {"model": PLAIN, "retrain.checkpoint_steps": 4})
    with open_run(config) as here:
        shutil.copytree(small_session.run.path("shards"), here.path("shards"))
        session = open_session(config, small_session.world, here, unheard)
        checkpoint.save(here, "dense/checkpoint", Checkpoint(dict(session.new_model().state_dict())))
        yield session


def in_two(rank: int, port: int, folder: str, config: dict[str, Any], run: Run) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    session = open_session(parse_config(config), current_world(torch.device("cpu")), run, unheard)
    found = {"undisturbed": retrained(session, "rounds/undisturbed")}
    update = Training._update

    def killed(self: Training, *args: Any) -> None:
        if self.position.step == 6:
            raise KeyboardInterrupt
        update(self, *args)

    Training._update = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        retrained(session, "rounds/stopped")
    Training._update = update  # type: ignore[method-assign]
    found["stopped"] = retrained(session, "rounds/stopped")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_go_on_to_the_same_bytes_and_end_as_one(prepared: Session, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(in_two, (port, str(tmp_path), prepared.config.model_dump(mode="json"), prepared.run), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for each in found:
        assert equal(each["undisturbed"], each["stopped"])
        assert equal(each["undisturbed"], found[0]["undisturbed"])
    start, alone = prepared.new_model().state_dict(), retrained(prepared, "rounds/alone")
    assert not torch.equal(alone["fc1.weight"], start["fc1.weight"])
    for name, tensor in alone.items():
        torch.testing.assert_close(found[0]["stopped"][name], tensor, rtol=1e-4, atol=1e-6)


def test_what_is_cut_away_is_nothing_in_the_whole_network(prepared: Session) -> None:
    subject, masks = subject_of(prepared)
    before = copy.deepcopy(subject.model.state_dict())
    _, kept = retraining.retrain(subject, "rounds/away", "rounds/01", masks, {}, None)
    assert kept is masks
    after = subject.model.state_dict()
    assert subject.model.get_parameter("fc1.weight").shape == (20, 144)
    for name, mask in masks.items():
        assert not after[name][~mask].any()
        assert not torch.equal(after[name], before[name])
        path = name.replace("weight", "bias")
        rows = mask.flatten(1).any(1)
        assert not after[path][~rows].any()
        assert bool((after[path][rows] != before[path][rows]).any())


def test_a_step_checkpoint_of_the_other_kind_is_refused(prepared: Session) -> None:
    subject, masks = subject_of(prepared)
    whole = Training(
        prepared, subject.model, prepared.config.retrain, "rounds/kind", "rounds/01", list(masks), masks
    )  # fmt: skip
    whole.position.step = 4
    whole._save()
    match = r"the checkpoint of rounds/kind at step 4 is of the whole network, and a small network \(cut \w{16}\) is "
    with pytest.raises(
        Agreed, match=match + r"trained: set prune\.shrink_between_rounds as it was, or remove '.*steps"
    ):
        retraining.retrain(subject, "rounds/kind", "rounds/01", masks, {}, None)


def test_a_network_that_is_another_function_when_small_is_not_trained(prepared: Session) -> None:
    subject, masks = subject_of(prepared)
    assert subject.groups is not None
    with torch.no_grad():
        subject.model.get_parameter("fc2.weight").add_(1.0)  # reads removed units again
    with pytest.raises(Agreed, match=r"^rounds/other: outputs of the small network differ .* by \d.*: set prune\."):
        retraining.retrain(subject, "rounds/other", "rounds/01", masks, {}, None)
    quiet = dataclasses.replace(subject, groups=None)  # of another pattern: nothing is cut
    retraining.retrain(quiet, "rounds/quiet", "rounds/01", masks, {}, None)


class Viewed(nn.Module):
    """The number of features is in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.conv(x)).view(-1, 144))
        return logits


class Auxiliary(nn.Module):
    """A second head that only training calls, as Inception has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc, self.second = nn.Linear(64, 8), nn.Linear(8, 10), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x.flatten(1)))
        logits: Tensor = self.fc(hidden)
        return logits + 0.3 * self.second(hidden) if self.training else logits


def refuse(model: nn.Module, config: Config) -> None:
    feed = Feed.of(config)
    groups: Groups = find(model, feed.zeros(2), {tensor.name: tensor.shape for tensor in survey(model)[0]})
    assert groups.by_name
    retraining.require(model, groups, feed, "model.factory=mine")


def test_networks_that_take_no_fewer_channels_are_refused(tiny: Callable[..., Config]) -> None:
    config = tiny()
    start = r"^prune\.shrink_between_rounds=true: model\.factory=mine "
    with pytest.raises(UserError, match=start + r"has a number of features in its code, at view, .*torch\.flatten"):
        refuse(Viewed(), config)
    with pytest.raises(UserError, match=start + r"cannot be trained with fewer channels: .*set it to false, or name"):
        refuse(Auxiliary(), config)
    refuse(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)), config)


def test_a_run_is_refused_before_it_begins(tiny: Callable[..., Config]) -> None:
    config = tiny(**CHANNELS | {"model": {"factory": "test_retraining:Viewed"}, "target.compression": 2})
    with pytest.raises(
        UserError, match=r"prune\.shrink_between_rounds=true: model\.factory=test_retraining:Viewed has"
    ):
        carry_out(config)
    assert not Path(run_root(config), "dense").exists()


def test_gradual_pruning_and_a_small_network_exclude_each_other(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"gradual=0\.5 prunes during the retraining, and shrink_between_rounds=true"):
        tiny(**CHANNELS | {"prune.gradual": 0.5})
