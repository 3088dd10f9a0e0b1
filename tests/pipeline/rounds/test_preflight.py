"""What only the first step of a training shows is known before anything is spent, in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ALONE
from torch import nn

from pipeline import stages
from pipeline.base.errors import UserError
from pipeline.local import LocalEngine
from pipeline.paper.reproduce import figure5_run
from pipeline.rounds import preflight
from pipeline.run.events import Event, Progress, StageBegun
from pipeline.run.state import open_run, run_root
from pipeline.settings.config import Config


class TwoOutputs(nn.Module):
    """In training a second output, as GoogLeNet has."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.fc(x.flatten(1))
        return (logits, logits) if self.training else logits


class Answer(dict[str, Any]):
    """Outputs by name, as Hugging Face's."""

    @property
    def logits(self) -> torch.Tensor:
        """The one that is wanted."""
        return self["logits"]


class NamedOutput(TwoOutputs):
    """Its outputs are named."""

    def forward(self, x: torch.Tensor) -> Any:
        return Answer(loss=None, logits=self.fc(x.flatten(1)))


class Volume(nn.Module):
    """A convolution over three dimensions, for which the format channels_last does not exist."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv3d(1, 2, 3, padding=1), nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x.unsqueeze(1)).flatten(1))


class Cut(nn.Module):
    """No gradient reaches its parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1)).detach()


class ComplexFilter(nn.Module):
    """A complex parameter among real ones."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes)
        self.filter = nn.Parameter(torch.ones(64, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((x.flatten(1) * self.filter).abs())


class Unused(nn.Module):
    """A layer that its output does not depend on."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc, self.spare = nn.Linear(64, classes), nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


class Wide(nn.Module):
    """Doubles in a layer: training it in bf16 meets another type."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1) if self.training else x.flatten(1).double())


class Remembering(nn.Module):
    """State that is no tensor."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(64, classes)

    def get_extra_state(self) -> Any:
        return {"note": "mine"}

    def set_extra_state(self, state: Any) -> None:
        """Take it back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def frozen(classes: int = 10) -> nn.Module:
    """Nothing in it can be trained."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    return network.requires_grad_(False)


def of(factory: str) -> dict[str, Any]:
    return {"model.factory": f"test_preflight:{factory}", "model.kwargs": {}, "prune.allocation": "uniform"}


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("factory", "more", "words"),
    [
        ("Cut", {}, "no gradient reaches its parameters"),
        ("ComplexFilter", {}, r"parameter filter is complex \(torch.complex64\)"),
        ("Unused", {"cluster.workers": 2}, r"spare.weight, spare.bias gets no gradient.*cluster.workers=1"),
        ("Wide", {}, "the first step of dense fails: .*dtype"),
        ("Remembering", {}, "_extra_state in its state_dict is no tensor"),
        ("frozen", {}, "every parameter has requires_grad=False"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before_anything_is_spent(
    tiny: Callable[..., Config], factory: str, more: dict[str, Any], words: str
) -> None:
    config, events = tiny(**of(factory), **more), list[Event]()
    with pytest.raises(UserError, match=rf"model.factory=test_preflight:{factory}.*{words}"):
        stages.run(config, LocalEngine(ALONE), events.append)
    assert not any(isinstance(event, StageBegun) for event in events)


def test_the_logits_among_several_outputs_are_taken(tiny: Callable[..., Config]) -> None:
    for factory in ("TwoOutputs", "NamedOutput"):
        preflight.check(tiny(**of(factory)))


def test_dense_epochs_may_be_0_only_where_something_is_trained(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"dense.epochs=0 and no model.checkpoint.*model.trained=true"):
        preflight.check(tiny(**{"dense.epochs": 0}))
    preflight.check(tiny(**{"dense.epochs": 0, "model.trained": True}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_a_driver_without_a_gpu_takes_workers_that_have_some(tiny: Callable[..., Config]) -> None:
    preflight.check(tiny(**{"device": "cuda", "cluster.gpus_per_worker": 1}))
    with pytest.raises(UserError, match=r"device=cuda, but this process sees no GPU"):
        preflight.check(tiny(device="cuda"))


def test_parts_that_are_not_images_keep_their_memory_format(tiny: Callable[..., Config]) -> None:
    preflight.check(tiny(**of("Volume"), **{"dense.channels_last": True}))


def test_one_worker_trains_a_network_with_a_layer_that_is_not_used(tiny: Callable[..., Config]) -> None:
    preflight.check(tiny(**of("Unused")))


def test_a_tensor_that_the_forward_pass_never_uses_is_named(tiny: Callable[..., Config]) -> None:
    with pytest.warns(UserWarning, match=r"never uses spare\.weight.*prune\.exclude"):
        preflight.check(tiny(**of("Unused")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preflight.check(tiny(**of("Unused"), **{"prune.exclude": ["spare.*"]}))


def test_a_budget_of_flops_needs_the_flops_of_each_tensor(tiny: Callable[..., Config]) -> None:
    mixed = {"model.factory": "networks:Mixed", "model.kwargs": {}}
    with pytest.warns(UserWarning, match=r"the FLOPs of one\.weight, two\.weight cannot be counted"):
        preflight.check(tiny(**mixed, **{"prune.allocation": "uniform"}))
    budget = {"prune.allocation": "budget", "target.budget": "flops"}
    with pytest.raises(UserError, match=r"target\.budget=flops: the FLOPs of one\.weight, two\.weight.*prune\.exclude"):
        preflight.check(tiny(**mixed, **budget))
    preflight.check(tiny(**mixed, **budget, **{"prune.exclude": ["one.*", "two.*"]}))


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("Attending", r"attention\.in_proj_weight is a weight of attention"),
        ("ThereAndBack", r"fc1\.weight is used outside of a layer of its own"),
    ],
)
def test_inputs_that_are_not_measured_rule_obs_out(tiny: Callable[..., Config], factory: str, words: str) -> None:
    settings = {"model.factory": f"networks:{factory}", "model.kwargs": {}, "prune.allocation": "uniform"}
    with pytest.raises(UserError, match=rf"prune\.criterion=obs: {words}.*prune\.exclude"):
        preflight.check(tiny(**settings, **{"prune.criterion": "obs"}))
    preflight.check(tiny(**settings, **{"prune.criterion": "taylor"}))


def scan(config: Config, progress: Progress) -> None:
    with open_run(config) as here:
        stages.scan(config, LocalEngine(ALONE), here, progress)


def measure_figure5(config: Config, progress: Progress) -> None:
    figure5_run(config, LocalEngine(ALONE), progress)


def run(config: Config, progress: Progress) -> None:
    stages.run(config, LocalEngine(ALONE), progress)


@pytest.mark.parametrize("command", [run, scan, measure_figure5])
def test_an_unknown_criterion_is_refused_before_the_dense_network_is_trained(
    tiny: Callable[..., Config], command: Callable[[Config, Progress], None]
) -> None:
    config, events = tiny(**{"prune.criterion": "magnitud"}), list[Event]()
    with pytest.raises(UserError, match=r"prune.criterion.*magnitud.*magnitude"):
        command(config, events.append)
    assert not any(isinstance(event, StageBegun) for event in events)
    assert not Path(run_root(config), "dense").exists()


def test_the_check_draws_no_random_number_and_leaves_no_file(tiny: Callable[..., Config]) -> None:
    config = tiny()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preflight.check(config)
    assert torch.equal(torch.rand(4), expected)
    assert not Path(run_root(config)).exists()
