"""Measures how long a network takes at several widths: the table that a budget of latency is spent by."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pipeline.base.seeding import generator
from pipeline.export import latency
from pipeline.network.compact import compact
from pipeline.network.groups import Groups
from pipeline.network.trace import graph_of
from pipeline.run.records import LatencyTable, Timed
from pipeline.run.state import fingerprint

FILE = "latency/table.json"  # in a run's folder
CENTRES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1)  # shares of channels around which widths are drawn
DRAWS = 2  # networks for each
SPREAD = 0.3  # standard deviation of the logarithm of a group's share
USUAL = latency.Passes(repeats=20, warmup=2, seconds=60.0)


def measure(
    model: nn.Module,
    groups: Groups,
    shape: Sequence[int],
    device: torch.device,
    where: str,
    batch: int = 1,
    threads: int = 1,
    passes: latency.Passes = USUAL,
) -> LatencyTable:
    """Time the whole network and some smaller ones, whose widths are always the same, step by step and as a whole.

    `shape` is a sample's, `where` names the device. Weights do not matter. Repeats are interleaved, each in another
    order, so that other load on the machine affects all networks alike. On one thread of a CPU the times are those of
    the thread's own work: what other processes take does not count.
    """
    keeps = widths(groups)
    example = torch.zeros(2, *shape)
    small = [shrunk(model, groups, keep, example).to(device).eval() for keep in keeps]
    clock = _clock(device, threads)
    stepwise = [_Runner(graph_of(each)[0], clock) for each in small]
    inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).to(device)
    whole: list[list[float]] = [[] for _ in small]
    draw, order = random.Random(0), range(len(small))
    with latency.with_threads(threads), torch.inference_mode():
        started = time.perf_counter()
        for repeat in range(-passes.warmup, passes.repeats):
            if repeat >= 5 and time.perf_counter() - started > passes.seconds:
                break
            for number in draw.sample(order, len(order)):
                begin = clock()
                small[number](inputs)
                milliseconds = _between(begin, clock())
                stepwise[number].run(inputs)
                if repeat >= 0:
                    whole[number].append(milliseconds)
                    stepwise[number].note()
    names = {step.name for step in groups.steps}
    timed = [
        Timed(keep, float(np.median(times)), each.medians(names))
        for keep, times, each in zip(keeps, whole, stepwise, strict=True)
    ]
    return LatencyTable(where, batch, network(groups, shape), tuple(timed))


def network(groups: Groups, shape: Sequence[int]) -> str:
    """A hash of what decides how long a network takes but for its device: steps, widths, the shape of a sample."""
    steps = [
        [step.name, *([width.fixed, sorted(width.whole.items())] for width in (step.reads, step.makes))]
        for step in groups.steps
    ]
    return fingerprint(steps, sorted(groups.sizes.items()), [*shape])


def widths(groups: Groups) -> list[dict[str, int]]:
    """The kept units of each group in the networks that are timed: all, and DRAWS draws around each of CENTRES."""
    draw = generator(0, "latency", "widths")
    made = [groups.sizes]
    for centre in CENTRES * DRAWS:
        shares = centre * np.exp(SPREAD * draw.standard_normal(len(groups.sizes)))
        counts = zip(groups.sizes.items(), shares.tolist(), strict=True)
        made.append({name: min(size, max(1, round(share * size))) for (name, size), share in counts})
    return made


def shrunk(model: nn.Module, groups: Groups, keep: Mapping[str, int], example: Tensor) -> nn.Module:
    """A copy of the network, on the CPU, that has the first so many units of each group; its weights do not matter."""
    work = copy.deepcopy(model).cpu().eval()
    kept = {name: np.arange(size) < keep[name] for name, size in groups.sizes.items()}
    masks = groups.masks(kept)
    with torch.no_grad():
        for name, parameter in work.named_parameters():
            if name.endswith("weight"):
                parameter[parameter == 0] = 0.01  # a channel that is 0 by its weights would be removed too
            if name in masks:
                parameter.mul_(masks[name])
    return compact(work, example).model


class _Runner(fx.Interpreter):
    """Runs a network's graph and notes how long each step takes."""

    def __init__(self, module: fx.GraphModule | None, clock: Callable[[], Any]) -> None:
        assert module is not None, "a network without a graph has no groups"
        super().__init__(module)
        self._clock = clock
        self._spans: dict[str, tuple[Any, Any]] = {}
        self._times: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        begin = self._clock()
        result = super().run_node(n)
        if n.op.startswith("call_"):
            self._spans[n.name] = begin, self._clock()
        return result

    def note(self) -> None:
        """Take the times of the last pass."""
        for name, span in self._spans.items():
            self._times.setdefault(name, []).append(_between(*span))

    def medians(self, names: Collection[str]) -> dict[str, float]:
        """The median time of each step of these names over the passes that were noted, in ms.

        The graph that runs also reads sizes, which is no step of the groups.
        """
        return {name: float(np.median(times)) for name, times in self._times.items() if name in names}


def _clock(device: torch.device, threads: int) -> Callable[[], Any]:
    """What marks a moment: an event of a GPU, or ns of this thread's own work, or ns."""
    if device.type != "cuda":
        return time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def event() -> torch.cuda.Event:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    return event


def _between(begin: Any, end: Any) -> float:
    """Milliseconds between two marks."""
    if isinstance(begin, int):
        return float(end - begin) / 1e6
    end.synchronize()
    return float(begin.elapsed_time(end))
