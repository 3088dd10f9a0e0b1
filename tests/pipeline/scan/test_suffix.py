"""What is computed again gives the answers of the whole forward pass, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from networks import Fire, Gate, Head, Residual
from torch import Tensor, nn

from pipeline.network.paper_networks import lenet_5
from pipeline.scan import suffix


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Looks(nn.Module):
    """Its own code looks into a tensor, so torch.fx cannot follow it; what runs next depends on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.either, self.other, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(x)))).mean([2, 3])
        x += 1  # in place on what a module returned
        x = self.either(x) if float(x.sum()) > 0 else self.other(x)
        return self.last(self.relu(x))


class Backwards(nn.Module):
    """Uses the weight of its last layer first, directly: no cut between modules is right."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :6]
        if len(x) > 10**6:
            return x
        x = torch.nn.functional.linear(x, self.last.weight)
        return self.last(self.first(x))


class InPlace(nn.Module):
    """What comes after the scanned layer adds into a tensor that does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.beside, self.scanned, self.last = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :4]
        sum_ = self.beside(x)
        sum_ += self.scanned(x)
        return self.last(sum_)


def squeezenet() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), Fire(6, 3, 4, 4), Gate(8), Fire(8, 2, 3, 3))
    return nn.Sequential(body, Head(6, 1, "mean"))


def resnet() -> nn.Module:
    def block(channels: int) -> nn.Module:
        inner = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        return Residual(nn.Sequential(inner, nn.Conv2d(channels, channels, 1)))

    return nn.Sequential(nn.Conv2d(1, 5, 3), block(5), block(5), Head(5, 1, "mean"))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[4].weight = model[2].weight
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lenet-5": (lenet_5, "fx"),
    "concat": (squeezenet, "fx"),
    "residual": (resnet, "fx"),
    "tied": (tied, "fx"),
    "in place": (InPlace, "fx"),
    "untraceable": (Looks, "borders"),
}


def cut(model: nn.Module, name: str, images: Tensor) -> tuple[suffix.Suffix, Callable[[float], None]]:
    """The cut chosen for a tensor, and what prunes the tensor below a size (0 puts it back)."""
    weight = dict(model.named_parameters())[name]
    dense = weight.detach().clone()

    def prune(size: float) -> None:
        weight.data.copy_(dense * (dense.abs() >= size))

    @contextmanager
    def pruned() -> Iterator[None]:
        prune(0.1)
        yield
        prune(0.0)

    return suffix.choose(model, [weight], images[:2], pruned), prune


@pytest.mark.parametrize("network", NETWORKS)
def test_every_tensor_at_every_level_answers_as_the_whole_network(network: str) -> None:
    torch.manual_seed(0)
    make, method = NETWORKS[network]
    model, images = make().eval(), torch.randn(5, 1, 28, 28)
    names = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    with torch.no_grad():
        for name in names:
            found, prune = cut(model, name, images)
            assert found.method == method
            kept = images.clone()
            state = found.prepare(images)
            for size in (0.05, 0.2, 0.01):
                prune(size)
                expected = model(images.clone())
                assert torch.equal(found.finish(state), expected)
            assert torch.equal(images, kept)
            prune(0.0)


def calls(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """The names of the layers that `run` called, in turn."""
    seen: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_only_what_is_downstream_runs_again_and_branches_beside_are_shared() -> None:
    torch.manual_seed(0)
    model, images = squeezenet().eval(), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        found, _ = cut(model, "0.2.left.weight", images)
        first = calls(model, lambda: found.prepare(images))
        again = calls(model, lambda: found.finish(found.prepare(images)))[len(first) :]
    assert first == ["0.0", "0.2.squeeze", "0.2.right"]
    assert again == ["0.2.left", "0.3.down", "0.3.up", "0.4.squeeze", "0.4.left", "0.4.right", "1.fc1", "1.fc2"]


def test_what_ran_before_the_tensor_is_given_again_where_the_code_cannot_be_followed() -> None:
    """A hook sees a module that gives its output again as called; it did not compute, so its weights do not matter."""
    torch.manual_seed(0)
    model, images = Looks().eval(), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        found, _ = cut(model, "last.weight", images)
        state, expected = found.prepare(images), model(images.clone())
        model.first.weight.zero_()
        model.either.weight.zero_()
        assert torch.equal(found.finish(state), expected)
        assert not torch.equal(model(images.clone()), expected)


def test_a_network_that_no_cut_is_right_for_runs_whole() -> None:
    torch.manual_seed(0)
    model, images = Backwards().eval(), torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        found, prune = cut(model, "last.weight", images)
        assert found.method == "whole"
        prune(0.2)
        assert torch.equal(found.finish(found.prepare(images)), model(images))
