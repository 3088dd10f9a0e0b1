"""Figure 5 as numbers: five curves of accuracy loss against parameters pruned away, and their order in the paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.base.record import Record
from pipeline.paper import printed
from pipeline.results.tables import TextTable, percent, signed
from pipeline.run.records import RoundMetrics


@dataclass(frozen=True)
class Line:
    """How a curve is measured: with which regulariser, how the network is pruned, and whether it is retrained."""

    regulariser: Literal["l1", "l2"]
    iterative: bool  # a chain of rounds; else the dense network pruned at once to each density
    retrained: bool


# The paper's legend.
CURVES = {
    "L2, retrained": Line("l2", iterative=False, retrained=True),
    "L1, retrained": Line("l1", iterative=False, retrained=True),
    "L1, not retrained": Line("l1", iterative=False, retrained=False),
    "L2, not retrained": Line("l2", iterative=False, retrained=False),
    "L2, iterative prune and retrain": Line("l2", iterative=True, retrained=True),
}
HIGH = 0.9  # the share of parameters away from which the paper's iterative curve stands apart
AS_IN_PAPER, REVERSED, MIXED, UNCLEAR = "as in the paper", "the other way round", "mixed", "no clear difference"


@dataclass(frozen=True)
class Measured:
    """What the run of one regulariser measured: top1 of its dense network on `samples` val images, and its rounds."""

    dense_top1: float
    samples: int
    one_shot: tuple[RoundMetrics, ...]
    iterative: tuple[RoundMetrics, ...]  # for L2 alone, as in the paper
    seconds: float


@dataclass(frozen=True)
class CurvePoint(Record):
    """One density: the share of parameters away, top1 on val, and its loss against the L2 dense network's top1."""

    density: float
    away: float
    top1: float
    loss: float


@dataclass(frozen=True)
class Curve(Record):
    """One curve of figure 5, by its name in the paper's legend."""

    name: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Claim(Record):
    """The paper's claim on two curves, whether our curves agree, and by how much."""

    claim: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class NetworkCurves(Record):
    """One network's part of result.json. `dense_top1` is that of each regulariser's dense network."""

    network: str
    seed: int
    split: str
    samples: int
    dense_top1: dict[str, float]
    curves: tuple[Curve, ...]
    order: tuple[Claim, ...]
    seconds: float


@dataclass(frozen=True)
class Figure5(Record):
    """The content of figure 5's result.json."""

    name: str
    networks: tuple[NetworkCurves, ...]


def assemble(network: str, seed: int, measured: Mapping[str, Measured]) -> NetworkCurves:
    """One network's curves from what the runs "l1" and "l2" measured; all losses are against the L2 dense network."""
    l2 = measured["l2"]
    curves = tuple(
        Curve(name, tuple(_point(l2.dense_top1, each, line.retrained) for each in _rounds(measured, line)))
        for name, line in CURVES.items()
    )
    return NetworkCurves(
        network=network,
        seed=seed,
        split="val",
        samples=l2.samples,
        dense_top1={regulariser: found.dense_top1 for regulariser, found in measured.items()},
        curves=curves,
        order=order(curves, l2.samples),
        seconds=sum(found.seconds for found in measured.values()),
    )


def _rounds(measured: Mapping[str, Measured], line: Line) -> Sequence[RoundMetrics]:
    found = measured[line.regulariser]
    return found.iterative if line.iterative else found.one_shot


def _point(reference: float, metrics: RoundMetrics, retrained: bool) -> CurvePoint:
    top1 = metrics.val.top1 if retrained else metrics.val_before_retrain.top1
    return CurvePoint(metrics.density, 1 - metrics.density, top1, reference - top1)


def order(curves: Sequence[Curve], samples: int) -> tuple[Claim, ...]:
    """The paper's claims on its curves, checked on ours."""
    whole = {curve.name: curve.points for curve in curves}
    high = {name: [point for point in points if point.away >= HIGH - 1e-9] for name, points in whole.items()}
    best, *others = "L2, iterative prune and retrain", "L2, retrained", "L1, retrained"
    return (
        _claim("Without retraining, L1 is better than L2", "L1, not retrained", "L2, not retrained", whole, samples),
        _claim("With retraining, L2 is better than L1", "L2, retrained", "L1, retrained", whole, samples),
        *(_claim(f"At {HIGH:.0%} away and more, iterative is better than {o}", best, o, high, samples) for o in others),
    )


def _claim(claim: str, better: str, worse: str, curves: Mapping[str, Sequence[CurvePoint]], samples: int) -> Claim:
    found = compare(curves[better], curves[worse], samples)
    if not found.gaps:
        return Claim(claim, UNCLEAR, "no point lies there")
    if found.wins and found.losses:
        verdict = MIXED
    else:
        verdict = AS_IN_PAPER if found.wins else REVERSED if found.losses else UNCLEAR
    largest = max(found.gaps, key=lambda gap: abs(gap.top1))
    detail = (
        f"clearly so at {found.wins} of {len(found.gaps)} points, clearly the other way at {found.losses}; the largest "
        f"gap is {signed(largest.top1, 2)} points, with {percent(largest.away)} away"
    )
    return Claim(claim, verdict, detail)


@dataclass(frozen=True)
class Gap:
    """How much better one curve is than another, in top1, with a share of the parameters away."""

    away: float
    top1: float


@dataclass(frozen=True)
class Compared:
    """At how many points a curve is clearly better, or clearly worse, than another, and the gap at each."""

    wins: int
    losses: int
    gaps: tuple[Gap, ...]


def compare(better: Sequence[CurvePoint], worse: Sequence[CurvePoint], samples: int) -> Compared:
    """Two curves, point by point.

    A gap is clear if it is more than two standard errors of a difference of two independent proportions. On the same
    images they are not independent, so this is conservative.
    """
    gaps, wins, losses = [], 0, 0
    for one, other in zip(better, worse, strict=True):
        gap = one.top1 - other.top1
        error = math.sqrt(sum(point.top1 * (1 - point.top1) / samples for point in (one, other)))
        wins += gap > 2 * error
        losses += -gap > 2 * error
        gaps.append(Gap(one.away, gap))
    return Compared(wins, losses, tuple(gaps))


def table(part: NetworkCurves) -> TextTable:
    """Accuracy loss in points, a row a density, a column a curve."""
    rows = [
        [percent(points[0].away), *(signed(-point.loss, 2) for point in points)]
        for points in zip(*(curve.points for curve in part.curves), strict=True)
    ]
    title = f"Figure 5, {printed.NETWORKS[part.network].title}: change of val accuracy in points"
    return TextTable(title, ["parameters away", *(curve.name for curve in part.curves)], rows)


def sentences(part: NetworkCurves) -> list[str]:
    """The order of the curves in words."""
    dense = part.dense_top1
    said = [f"{row.claim}: {row.verdict} ({row.detail})." for row in part.order]
    return [
        *said,
        f"Losses are against the dense network with L2, {percent(dense['l2'], 2)} on val; the one with L1 has "
        f"{percent(dense['l1'], 2)}. One seed ({part.seed}), {part.samples:,} val images; test is not looked at.",
    ]


def markdown(found: Figure5, files: Mapping[str, str], command: str) -> str:
    """reproduce.md of figure 5; `files` holds each network's picture."""
    parts = ["# Figure 5: accuracy loss against parameters away", f"The paper's: {printed.FIGURES[5]}"]
    for part in found.networks:
        title = printed.NETWORKS[part.network].title
        said = "\n".join(f"- {sentence}" for sentence in sentences(part))
        parts += [f"## {title}", f"![Figure 5, {title}]({files[part.network]})", said, table(part).markdown()]
        parts.append(f"All points took {part.seconds:.0f} s.")
    parts.append(f"Made by `{command}`, which goes on where it was stopped and repeats nothing.")
    return "\n\n".join(parts) + "\n"
