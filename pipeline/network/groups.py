"""Groups of channels that can be removed from a network, found by following it.

A unit is a channel (or a head of attention) wherever it goes, see `pipeline.network.follow`: a row of the layer that
makes it, columns of the layers that read it, and, where tensors are added or multiplied, rows of all layers that make
them. It can only be removed everywhere at once. Units that lie in the same way in the same tensors form a group. They
can stand in for each other, so only how many of a group stay decides how large each tensor is.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from pipeline.network.follow import Follower
from pipeline.network.modes import evaluating
from pipeline.network.operations import CHANNELWISE
from pipeline.network.signals import Flags, Layer, Numbers, Units
from pipeline.network.trace import Traced, traced

OUTPUTS, INPUTS = 0, 1  # the axes of a weight that hold channels


@dataclass(frozen=True)
class Member:
    """Where the units of a group lie in one weight: `places[u]` are those of unit u along `axis`, (units, places)."""

    tensor: str
    axis: int
    places: Numbers


@dataclass(frozen=True)
class Group:
    """Units that go together through `members`, prunable weights. Its name is that of its first tensor.

    `carried` are the biases, norms and other tensors with a number for each channel in which the units lie too.
    """

    name: str
    members: tuple[Member, ...]
    carried: tuple[Member, ...] = ()

    @property
    def units(self) -> int:
        """How many channels it has."""
        return len(self.members[0].places)


@dataclass(frozen=True)
class Width:
    """A number of channels: `fixed` of them, and for each group those of all its units."""

    fixed: int
    whole: dict[str, int]


@dataclass(frozen=True)
class Step:
    """An operation of the network: the channels that it reads, of all its inputs, and those that it makes."""

    name: str
    reads: Width
    makes: Width


@dataclass(frozen=True)
class Groups:
    """The groups of a network by name, and notes on what is left alone. `shapes` are those of all prunable tensors.

    `steps` are the operations of the network in their order. `hard_coded` are the calls in its code that name a number
    of features, and take no other.
    """

    by_name: dict[str, Group]
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    hard_coded: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The units of each group."""
        return {name: group.units for name, group in self.by_name.items()}

    @property
    def whole(self) -> dict[str, Flags]:
        """Every unit of each group stays."""
        return {name: np.ones(group.units, np.bool_) for name, group in self.by_name.items()}

    def gone(self, kept: Mapping[str, Flags]) -> dict[str, tuple[list[int], list[int]]]:
        """The rows and the columns that go from each tensor of the groups, carried ones too, in any order.

        `kept` has (units,) for each group.
        """
        found: dict[str, tuple[list[int], list[int]]] = {}
        for name, group in self.by_name.items():
            for member in (*group.members, *group.carried):
                lines = found.setdefault(member.tensor, ([], []))[member.axis]
                lines.extend(member.places[~kept[name]].ravel().tolist())
        return found

    def masks(self, kept: Mapping[str, Flags]) -> dict[str, Tensor]:
        """The mask of each tensor, True where all units stay that meet there; `kept` has (units,) for each group."""
        gone, made = self.gone(kept), {}
        for name, shape in self.shapes.items():
            rows, columns = (torch.ones(size, dtype=torch.bool) for size in shape[:2])
            if name in gone:
                rows[gone[name][OUTPUTS]] = False
                columns[gone[name][INPUTS]] = False
            both = rows[:, None] & columns[None, :]
            made[name] = both.view(*both.shape, *[1] * (len(shape) - 2)).expand(shape).contiguous()
        return made

    def counts(self, keep: Mapping[str, int]) -> dict[str, int]:
        """The weights that each tensor keeps where so many units of each group stay. They need no masks."""
        sizes = {name: [shape[0], shape[1]] for name, shape in self.shapes.items()}
        for name, group in self.by_name.items():
            for member in group.members:
                sizes[member.tensor][member.axis] -= (group.units - keep[name]) * member.places.shape[1]
        return {name: math.prod(sizes[name]) * math.prod(shape[2:]) for name, shape in self.shapes.items()}

    def at_stake(self, name: str) -> int:
        """The weights of all tensors that go where one unit of this group stays, and all of the others."""
        return sum(self.counts(self.sizes).values()) - sum(self.counts(self.sizes | {name: 1}).values())

    def alive(self, masks: Mapping[str, Tensor]) -> dict[str, Flags]:
        """Which units of each group stay in these masks, (units,): those whose rows and columns hold a kept weight.

        A tensor without a mask is whole.
        """
        found = {}
        for name, group in self.by_name.items():
            stays = np.ones(group.units, np.bool_)
            for member in (each for each in group.members if each.tensor in masks):
                others = [axis for axis in range(len(self.shapes[member.tensor])) if axis != member.axis]
                used = masks[member.tensor].cpu().any(dim=others).numpy()
                stays &= used[member.places].any(1)
            found[name] = stays
        return found


def find(model: nn.Module, example: Tensor, prunable: Mapping[str, Sequence[int]]) -> Groups:
    """The groups of a network; `prunable` gives the shapes of the tensors that may be pruned, by name.

    `example` is an input, (batch, ...); its values do not matter. A unit that touches a weight which stays dense, or a
    step that cannot be followed, is in no group. Where nothing can be followed, there are no groups, and notes say why.
    """
    shapes = {name: tuple(shape) for name, shape in prunable.items()}
    with evaluating(model):
        graph = traced(model, example)
    if not isinstance(graph, Traced):
        return Groups({}, shapes, tuple(graph))
    followed = Follower(graph)
    for layer in followed.layers:
        _level(layer, followed.units)
    pinned, notes = _pinned(followed, shapes)
    weights, carried = [*_weights(followed)], [*_carried(followed)]
    sides = (*weights, *carried)
    at: dict[int, dict[int, list[int]]] = {}  # root: number of the side: places
    for number, side in enumerate(sides):
        for root, place in zip(followed.units.roots(side.units).tolist(), side.places.tolist(), strict=True):
            held = at.setdefault(root, {}).setdefault(number, [])
            if place not in held:
                held.append(place)
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, lies in at.items():
        if root not in pinned and min(lies) < len(weights):
            alike.setdefault(tuple((number, len(places)) for number, places in sorted(lies.items())), []).append(root)
    groups: dict[str, Group] = {}
    of_root: dict[int, str] = {}
    for signature, roots in alike.items():
        members: tuple[list[Member], list[Member]] = ([], [])
        for number, _ in signature:
            places = np.array([at[root][number] for root in roots])
            members[number >= len(weights)].append(Member(sides[number].tensor, sides[number].axis, places))
        name = _free(members[0][0].tensor, groups)
        groups[name] = Group(name, tuple(members[0]), tuple(members[1]))
        of_root |= dict.fromkeys(roots, name)
    notes = [*graph.notes, *followed.notes, *notes]
    hard_coded = [*graph.hard_coded, *_hard_coded(followed, of_root)]
    return Groups(groups, shapes, tuple(notes), _steps(graph, followed, of_root), tuple(hard_coded))


def _hard_coded(followed: Follower, of_root: Mapping[int, str]) -> Iterator[str]:
    """The calls that split features into heads, or join them, with numbers that a head less would change."""
    for each in followed.reshaped:
        roots = followed.units.roots(each.units)
        if each.hard_coded(roots) and not of_root.keys().isdisjoint(roots.ravel().tolist()):
            yield each.node.name


def _steps(graph: Traced, followed: Follower, of_root: Mapping[int, str]) -> tuple[Step, ...]:
    """The operations of a graph, with their widths; `of_root` has the group of each unit that can go."""

    def width(nodes: Sequence[fx.Node]) -> Width:
        units = [followed.units.roots(followed.made(node)).tolist() for node in nodes]
        named = Counter(of_root.get(root) for root in itertools.chain(*units))
        fixed = named.pop(None, 0)
        return Width(fixed, {name: count for name, count in sorted(named.items()) if name is not None})

    return tuple(
        Step(node.name, width(node.all_input_nodes), width([node]))
        for node in graph.module.graph.nodes
        if node.op.startswith("call_")
    )


def _free(name: str, taken: Collection[str]) -> str:
    """The name, or the name with the first number that is free."""
    return (
        name
        if name not in taken
        else next(f"{name}#{i}" for i in range(2, len(taken) + 3) if f"{name}#{i}" not in taken)
    )


def _level(layer: Layer, units: Units) -> None:
    """Join the units at one position of all groups of a grouped convolution: its groups keep equally many channels."""
    groups = len(layer.reads)
    if groups > 1 and not layer.depthwise:
        for each in (layer.inputs, layer.outputs):
            first, *others = each.reshape(groups, -1)
            for other in others:
                units.join(first, other)


class _Side(NamedTuple):
    """An axis of a tensor that holds channels: the unit and the place of each."""

    tensor: str
    axis: int
    units: Numbers
    places: Numbers


def _weights(followed: Follower) -> Iterator[_Side]:
    """The sides of the layers' weights."""
    for layer in followed.layers:
        yield _Side(layer.tensors[0], OUTPUTS, layer.outputs, np.arange(len(layer.outputs)))
        if not layer.depthwise:
            places = np.arange(len(layer.inputs)) % layer.reads.shape[2]
            yield _Side(layer.tensors[0], INPUTS, layer.inputs, places)


def _carried(followed: Follower) -> Iterator[_Side]:
    """The sides of all other tensors that have a number for each channel: biases, norms and their statistics."""
    for layer in followed.layers:
        if layer.bias is not None:
            yield _Side(layer.tensors[1], OUTPUTS, layer.outputs, np.arange(len(layer.outputs)))
    for carrier in followed.carriers:
        for name in CHANNELWISE:
            if getattr(carrier.module, name, None) is not None:
                full = f"{carrier.path}.{name}" if carrier.path else name
                yield _Side(full, OUTPUTS, carrier.units, np.arange(len(carrier.units)))


def _pinned(followed: Follower, shapes: Collection[str]) -> tuple[set[int], list[str]]:
    """The roots of units that stay, and notes on the weights that stay dense and keep some."""
    units, notes = followed.units, []
    for layer in followed.layers:
        if layer.tensors[0] not in shapes:
            units.pin(layer.outputs)
            units.pin(layer.inputs)
            notes.append(f"{layer.tensors[0]} stays dense, and so do the channels that it makes and reads")
    return set(units.pinned().tolist()), notes
