"""Code through which channels are easily followed wrongly: followed rightly, or left alone, and never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.export.export import save_compact
from pipeline.network.apart import apart
from pipeline.network.compact import compact, rebuild
from pipeline.network.groups import Groups, find
from pipeline.network.shrink import shrink
from pipeline.network.survey import survey

L, C = nn.Linear, nn.Conv2d


class By(nn.Module):
    """A network whose forward is a function of its layers and an input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.by = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.by(self, x)


class Doubled(nn.MultiheadAttention):
    """Attention whose own code does more than torch's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        return super().forward(q, k, v, need_weights=False)[0] * 2 + q, None


class Optional(nn.Module):
    """Other code runs where the second argument is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L(6, 8), L(8, 3)

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h.flip(1) if order is None else h)


class WithLoss(nn.Module):
    """It gives a loss besides where it is told what is right."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = L(6, 8), L(8, 3)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        y = self.b(torch.relu(self.a(x)))
        return y if targets is None else (y, F.cross_entropy(y, targets))


class Looking(nn.Module):
    """Takes attention's tuple, and looks into its numbers."""

    def forward(self, pair: Any) -> Tensor:
        first: Tensor = pair[0]
        return first if float(first.sum()) > 1e9 else first * 1


class Loop(nn.Module):
    """Calls a layer as often as its input is long."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] - 6):
            x = torch.tanh(self.layer(x))
        return x


class Within(nn.Module):
    """A layer is called once here, and within a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.c = L(8, 8)
        self.i, self.j, self.o, self.p, self.loop = L(6, 8), L(6, 8), L(8, 3), L(8, 3), Loop(self.c)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.o(torch.relu(self.c(torch.relu(self.i(x))))) + self.p(self.loop(self.j(x)))
        return made


def bert(s: Any, x: Tensor) -> Any:
    def split(u: Tensor) -> Tensor:
        return u.view(u.size()[:-1] + (4, 2)).permute(0, 2, 1, 3)  # noqa: RUF005 (as BERT's code has it)

    mixed = F.scaled_dot_product_attention(split(s.q(x)), split(s.k(x)), split(s.v(x)))
    return s.o(mixed.permute(0, 2, 1, 3).flatten(2))


def handed_on(s: Any, x: Tensor) -> Any:
    h = s.e(x)
    return s.p(s.k(s.m(h, h, h)))


def two(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    return By(forward, a=L(6, 8), b=L(8, 3))


def half(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    return By(forward, a=L(6, 8), b=L(4, 3))


# name: what makes the network, the shape of a sample, and whether it has a group of channels that may go
ODD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "a pool over features": (lambda: nn.Sequential(L(6, 8), nn.ReLU(), nn.AvgPool1d(3, 1, 1), L(8, 3)), (6,), False),
    "a pool of 2 axes over channels": (
        lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.MaxPool2d(3, 1, 1), nn.Conv1d(8, 3, 1)), (2, 10), False
    ),
    "its function": (
        lambda: By(lambda s, x: s.b(F.max_pool2d(s.a(x), 3, 1, 1)), a=nn.Conv1d(2, 8, 3), b=nn.Conv1d(8, 3, 1)),
        (2, 10), False,
    ),
    "features pooled to fewer": (lambda: nn.Sequential(L(6, 8), nn.MaxPool1d(2), L(4, 3)), (6,), False),
    "features pooled to as many": (lambda: two(lambda s, x: s.b(F.adaptive_avg_pool1d(torch.relu(s.a(x)), 8))),
                                   (6,), False),
    "a pool of a batch": (
        lambda: nn.Sequential(nn.Conv1d(2, 8, 3), nn.MaxPool1d(2), nn.Conv1d(8, 3, 1)), (2, 10), True
    ),
    "maxout": (lambda: half(lambda s, x: s.b(torch.stack(s.a(x).chunk(2, -1)).amax(0))), (6,), False),
    "parts joined again": (lambda: two(lambda s, x: s.b(torch.cat(s.a(x).chunk(2, -1)[::-1], -1))), (6,), False),
    "parts given": (lambda: two(lambda s, x: s.b(torch.relu(s.a(x))).chunk(3, -1)), (6,), True),
    "attention with code of its own": (
        lambda: By(lambda s, x: s.h(s.m(x, x, x)[0]), m=Doubled(8, 4, batch_first=True), h=L(8, 3)), (6, 8), False
    ),
    "an argument that is left out": (Optional, (6,), False),
    "a loss that is not asked for": (WithLoss, (6,), True),
    "a layer's size in a number": (lambda: two(lambda s, x: s.b(torch.relu(s.a(x)) / s.a.out_features**0.5)),
                                   (6,), True),
    "channels last": (
        lambda: By(lambda s, x: s.b(s.a(x).contiguous(memory_format=torch.channels_last)), a=C(1, 8, 3), b=C(8, 3, 1)),
        (1, 8, 8), True,
    ),
    "a clone": (
        lambda: By(lambda s, x: s.b(s.a(x).clone(memory_format=torch.channels_last)), a=C(1, 8, 3), b=C(8, 3, 1)),
        (1, 8, 8), True,
    ),
    "sizes that a step makes": (lambda: By(bert, q=L(8, 8), k=L(8, 8), v=L(8, 8), o=L(8, 3)), (5, 8), False),
    "sizes by keyword": (
        lambda: By(lambda s, x: s.b(s.a(x).view(size=(x.shape[0], -1))), a=C(1, 4, 3), b=L(144, 3)), (1, 8, 8), True
    ),
    "a size by keyword": (
        lambda: By(lambda s, x: s.b(s.a(x).reshape(shape=(-1, 144))), a=C(1, 4, 3), b=L(144, 3)), (1, 8, 8), True
    ),
    "an axis that is worked out": (
        lambda: By(lambda s, x: s.b(torch.cat([s.a(x), s.c(x)], x.ndim - 1)), a=L(6, 4), c=L(6, 4), b=L(8, 3)),
        (6,), False,
    ),
    "attention's pair handed on": (
        lambda: By(handed_on, e=L(5, 8), m=nn.MultiheadAttention(8, 4, batch_first=True), k=Looking(), p=L(8, 3)),
        (6, 5), False,
    ),
    "a tensor added to itself": (lambda: two(lambda s, x: s.b(torch.add(h := s.a(x), other=h))), (6,), False),
    "a layer called within a step too": (Within, (6,), False),
    "a quotient of channels": (
        lambda: By(lambda s, x: s.c(s.a(x) / s.b(x)), a=L(6, 8, bias=False), b=L(6, 8, bias=False), c=L(8, 3)),
        (6,), False,
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor, Groups]:
    """The network with half of its channels masked, an example, and its groups."""
    make, shape, _ = ODD[name]
    torch.manual_seed(0)
    network, example = make().eval(), torch.zeros(2, *shape)
    groups = find(network, example, {each.name: each.shape for each in survey(network)[0]})
    for tensor, mask in groups.masks({key: flags.cumsum() % 2 == 1 for key, flags in groups.whole.items()}).items():
        network.get_parameter(tensor).data.mul_(mask)
    return network, example, groups


@pytest.mark.parametrize("name", ODD)
def test_it_is_followed_rightly_or_left_alone(name: str) -> None:
    network, example, groups = made(name)
    assert bool(groups.by_name) is ODD[name][2]
    assert groups.by_name or groups.notes
    with torch.no_grad():
        assert network(torch.randn_like(example))[0].isfinite().all()
    assert apart(network, compact(network, example).model, example) < 1e-5


@pytest.mark.parametrize("name", [name for name, (_, _, followed) in ODD.items() if followed])
def test_it_loses_its_channels(name: str, tmp_path: Path) -> None:
    network, example, groups = made(name)
    found = compact(network, example)
    assert sum(found.removed.values()) == sum(group.units // 2 for group in groups.by_name.values()) > 0
    save_compact(found, tmp_path / "compact.safetensors")
    again = rebuild(ODD[name][0](), tmp_path / "compact.safetensors")
    assert apart(network, again, example) < 1e-5
    masks = {each.name: network.get_parameter(each.name) != 0 for each in survey(network)[0]}
    if not groups.hard_coded and name != "a layer's size in a number":  # the network's own code, which reads that size
        assert apart(network, shrink(network, groups, masks).model, example) < 1e-5


def test_code_that_cannot_be_understood_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is followed wrongly: where the outputs would be others, nothing is removed."""
    from pipeline.network import operations

    monkeypatch.setitem(operations.POOLED, nn.AvgPool1d, 0)  # as if a pool over features were none
    network, example, _ = made("a pool over features")
    found = compact(network, example)
    assert set(found.removed.values()) == {0}
    assert any("nothing is removed: the outputs would be others" in note for note in found.notes)
    assert apart(network, found.model, example) == 0


def test_layers_that_evaluation_never_calls_are_named() -> None:
    network = By(lambda s, x: (s.b(s.a(x)), s.aux(x)) if s.training else s.b(s.a(x)), a=L(6, 8), b=L(8, 3), aux=L(6, 3))
    groups = find(network.eval(), torch.zeros(2, 6), {each.name: each.shape for each in survey(network)[0]})
    assert "never called in evaluation, and so left alone: aux" in groups.notes
