"""Several runs of one network, each with another seed, aggregated beside the paper's numbers. Pure functions.

Shares and errors are fractions in 0..1, as in result.json; only the paper's own numbers are percent, as printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from pipeline.base.record import Record
from pipeline.paper import printed
from pipeline.run.result import LayerResult, Result


@dataclass(frozen=True)
class SeedRun:
    """A finished run of one seed, with each layer's number of outputs and the place where its Act% was measured."""

    seed: int
    path: str
    result: Result
    outputs: Mapping[str, int]
    measured: Mapping[str, str]


@dataclass(frozen=True)
class Against(Record):
    """Mean and sample standard deviation over seeds, the paper's number, and the mean minus that number; None without
    one.
    """

    mean: float | None
    std: float | None
    paper: float | None
    difference: float | None


@dataclass(frozen=True)
class OnTestSet(Record):
    """Top-1 errors of one seed on test."""

    dense: float
    dense_control: float | None
    pruned: float


@dataclass(frozen=True)
class OnValidation(Record):
    """Top-1 errors of one seed on val."""

    dense: float
    pruned: float


@dataclass(frozen=True)
class SeedRow(Record):
    """One seed's numbers, as its own result.json has them; `run` is its folder."""

    seed: int
    run: str
    verdict: str
    test_error: OnTestSet
    drop: float
    val_error: OnValidation
    compression: float
    weights_total: int
    weights_kept: int
    test_looks: int
    seconds: float


@dataclass(frozen=True)
class Reached(Record):
    """Whether the paper's row is reached: its compression, at no more error than its dense network."""

    compression: bool
    test_error: bool
    both: bool


@dataclass(frozen=True)
class Limits(Record):
    """What the paper's row asks for."""

    compression: float
    test_error: float


@dataclass(frozen=True)
class Table1(Record):
    """A row of table 1."""

    test_error_dense: Against
    test_error_dense_control: Against
    test_error_pruned: Against
    drop: Against
    weights: Against
    weights_kept: Against
    compression: Against


@dataclass(frozen=True)
class Beside(Record):
    """A number that is the same for all seeds, and the paper's."""

    ours: int | None
    paper: int | None


@dataclass(frozen=True)
class LayerBeside(Record):
    """A row of table 2 or 3: Act%, Weights% and FLOP% are shares left after pruning."""

    name: str
    weights: Beside
    flops: Beside
    activation_density: Against
    density: Against
    flops_density: Against


@dataclass(frozen=True)
class NetworkFound(Record):
    """The content of a network's result.json: each seed, mean and spread over seeds, and the paper's beside them."""

    name: str
    network: str
    passed: Reached
    seeds_passed: int
    limits: Limits
    table1: Table1
    layers: tuple[LayerBeside, ...]
    act_measured: dict[str, str]
    test_looks: int
    seconds: float
    seeds: tuple[SeedRow, ...]


@dataclass(frozen=True)
class LayerSize:
    """Weights and FLOPs of a layer when dense; None where the paper does not have it."""

    weights: int | None
    flops: int | None


@dataclass(frozen=True)
class Shares:
    """Act%, Weights% and FLOP% as fractions, of one seed or the paper; None where there is none."""

    activation: float | None
    weights: float | None
    flops: float | None


def aggregate(name: str, network: printed.Network, runs: Sequence[SeedRun]) -> NetworkFound:
    """The runs of all seeds together, and the paper's numbers beside them."""
    seeds = tuple(_seed(run) for run in runs)
    table = Table1(
        test_error_dense=against([seed.test_error.dense for seed in seeds], network.dense_error / 100),
        test_error_dense_control=against([seed.test_error.dense_control for seed in seeds], None),
        test_error_pruned=against([seed.test_error.pruned for seed in seeds], network.pruned_error / 100),
        drop=against([seed.drop for seed in seeds], (network.pruned_error - network.dense_error) / 100),
        weights=against([seed.weights_total for seed in seeds], network.weights),
        weights_kept=against([seed.weights_kept for seed in seeds], network.weights_kept),
        compression=against([seed.compression for seed in seeds], network.compression),
    )
    compression = fmean(seed.compression for seed in seeds)
    test_error = fmean(seed.test_error.pruned for seed in seeds)
    return NetworkFound(
        name=name,
        network=network.title,
        passed=within(network, compression, test_error),
        seeds_passed=sum(within(network, seed.compression, seed.test_error.pruned).both for seed in seeds),
        limits=Limits(network.compression, network.dense_error / 100),
        table1=table,
        layers=tuple(layer_rows(network, runs)),
        act_measured=dict(runs[0].measured),
        test_looks=sum(seed.test_looks for seed in seeds),
        seconds=sum(seed.seconds for seed in seeds),
        seeds=seeds,
    )


def within(network: printed.Network, compression: float, test_error: float) -> Reached:
    """Whether the paper's row is reached."""
    small = compression >= network.compression - 1e-9
    good = test_error <= network.dense_error / 100 + 1e-9
    return Reached(small, good, small and good)


def against(values: Sequence[float | None], theirs: float | None) -> Against:
    """Our values of all seeds against the paper's; a value that a seed lacks leaves no mean."""
    known = [value for value in values if value is not None]
    mean = fmean(known) if known and len(known) == len(values) else None
    return Against(
        mean=mean,
        std=stdev(known) if mean is not None and len(known) > 1 else None,
        paper=theirs,
        difference=None if mean is None or theirs is None else mean - theirs,
    )


def _seed(run: SeedRun) -> SeedRow:
    result, test, val = run.result, run.result.test, run.result.val
    errors = OnTestSet(
        dense=1 - test.dense.top1,
        dense_control=None if test.dense_control is None else 1 - test.dense_control.top1,
        pruned=1 - test.pruned.top1,
    )
    return SeedRow(
        seed=run.seed,
        run=run.path,
        verdict=result.verdict,
        test_error=errors,
        drop=errors.pruned - errors.dense,
        val_error=OnValidation(1 - val.dense.top1, 1 - val.pruned.top1),
        compression=result.compression,
        weights_total=result.weights_total,
        weights_kept=result.weights_kept,
        test_looks=result.test_looks,
        seconds=sum(seconds for _, seconds in result.seconds if seconds is not None),
    )


def layer_rows(network: printed.Network, runs: Sequence[SeedRun]) -> list[LayerBeside]:
    """Rows of table 2 or 3, the last one the total; a layer that the paper does not have has None beside it."""
    theirs = {layer.name: layer for layer in network.layers}
    rows = []
    for same in zip(*(run.result.layers for run in runs), strict=True):
        name, size = same[0].name.removesuffix(".weight"), LayerSize(same[0].weights, same[0].flops)
        rows.append(_row(name, size, [_shares(layer) for layer in same], theirs.get(name)))
    layers = runs[0].result.layers
    whole = LayerSize(sum(layer.weights for layer in layers), sum(layer.flops or 0 for layer in layers))
    total = [Shares(activation_total(run), run.result.density, run.result.flops_density) for run in runs]
    return [*rows, _row("total", whole, total, network.total)]


def activation_total(run: SeedRun) -> float:
    """The share of all layers' outputs that is not zero."""
    layers = run.result.layers
    active = sum(run.outputs[layer.name] * (layer.activation_density or 0.0) for layer in layers)
    return active / sum(run.outputs[layer.name] for layer in layers)


def _shares(layer: LayerResult) -> Shares:
    return Shares(layer.activation_density, layer.density, layer.flops_density)


def _row(name: str, size: LayerSize, ours: Sequence[Shares], theirs: printed.PrintedLayer | None) -> LayerBeside:
    paper = LayerSize(None, None) if theirs is None else LayerSize(theirs.weights, theirs.flops)
    left = Shares(None, None, None)
    if theirs is not None:
        left = Shares(theirs.activations / 100, theirs.weights_left / 100, theirs.flops_left / 100)
    return LayerBeside(
        name=name,
        weights=Beside(size.weights, paper.weights),
        flops=Beside(size.flops, paper.flops),
        activation_density=against([each.activation for each in ours], left.activation),
        density=against([each.weights for each in ours], left.weights),
        flops_density=against([each.flops for each in ours], left.flops),
    )
