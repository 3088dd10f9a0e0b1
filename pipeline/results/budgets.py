"""Several budgets from one scan: what each tensor would keep, and what it would cost. Nothing is scanned again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.base.errors import UserError
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.network.survey import survey
from pipeline.prune import channels, damage, limits, patterns, round_plan, schedules
from pipeline.prune.budget import Solution
from pipeline.results.tables import TextTable, percent
from pipeline.rounds import preflight, sharing, timing
from pipeline.rounds.subject import price_of
from pipeline.run import state
from pipeline.run.records import Scan
from pipeline.settings.config import Config
from pipeline.task.feed import Feed

CURVE = 25  # compressions of the curve
BAR = 60  # characters of its longest bar


@dataclass(frozen=True)
class Option:
    """One budget, solved. `flops` and `bytes` are of the prunable tensors; `seconds` is the time of solving alone."""

    compression: float
    budget: int
    solution: Solution
    kept: int
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Options:
    """Budgets asked for, and a curve of others between none and the largest of them.

    `weights` are each tensor's, or the channels of each group, and `total` the weights of all of them; `chance` is the
    rise of the loss (nats) at which the network guesses; `seconds` the time of making the curves and their hulls, once
    for all budgets; `together` says whether the scan also pruned all tensors together.
    """

    unit: cost.Quantity
    weights: dict[str, int]
    total: int
    asked: list[Option]
    curve: list[Option]
    chance: float
    seconds: float
    together: bool


def parse(text: str) -> list[float]:
    """The compressions in "2,4,8". Raises UserError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(1.0 <= each < float("inf") for each in found):
        raise UserError(f"--budgets {text}: takes compressions of 1 or more, as in --budgets 2,4,8,16")
    return found


def solve(config: Config, compressions: Sequence[float]) -> Options:
    """Solve `prune.allocation=budget` from the scan of the config's run for several compressions.

    Raises UserError where there is no scan, or limits rule a budget out.
    """
    run = state.Run(state.run_root(config), 0)
    if not run.has("scan", "scan.json"):
        raise UserError(f"--budgets needs a scan, and '{run.root}' has none yet: `secateur scan CONFIG` makes it")
    scan, classes = run.load(Scan, "scan", "scan.json"), preflight.count_samples(config.data, config.seed).classes
    model = build_network(config.model, classes, config.seed)
    counted = cost.count(model, Feed.of(config).shape)
    flops, prune, unit = counted.by_tensor, config.prune, config.target.budget
    prunable, _ = survey(model, prune.include, prune.exclude)
    groups = channels.groups_of(model, prunable, Feed.of(config).zeros(2, torch.device("cpu")), prune)
    weights = {tensor.name: tensor.weights for tensor in scan.tensors}
    if missing := weights.keys() - (flops if groups is None else groups.by_name).keys():
        raise UserError(f"the scan in '{run.root}' is of another network: it has {', '.join(sorted(missing)[:3])}")
    sizes = {tensor.name: tensor.weights for tensor in prunable}
    preflight.require_counted(counted, sizes, unit)
    shared = sharing.bits(config, model, prunable)
    started = time.perf_counter()
    scanned = round_plan.scanned(unit, scan, classes, flops, groups)
    price = price_of(unit, groups, sizes, flops, timing.known(config, run, groups))
    timing.require_known(config, price)
    if groups is None or price is None:
        living = patterns.most(prune, {name: model.get_parameter(name).shape for name in weights})
        floors, caps = limits.bounds(weights, living, prune.min_weights, prune.floors, prune.ceilings)
        total, least, most = (limits.spent(counts, scanned.prices) for counts in (weights, floors, caps))
        spend = scanned.damages.within(floors, caps)
    else:
        floors, caps = channels.bounds(prune, groups.whole)
        total, least, most = price(groups.sizes), price(floors), price(caps)

        def spend(budget: int) -> Solution:
            return channels.solve(scanned.damages, floors, caps, budget, price)

    spend(most)
    ready = time.perf_counter() - started

    def option(compression: float) -> Option:
        money = schedules.budgets([1 / compression], total, compression)[0]
        limits.require_possible(money, least, max(most, money), prune.min_weights, len(weights), unit)
        clock = time.perf_counter()
        found = spend(min(money, most))
        seconds = time.perf_counter() - clock

        kept = found.keep if groups is None else groups.counts(found.keep)

        def amount(of: cost.Quantity) -> int:
            return sum(cost.price(of, sizes[name], flops[name])(count) for name, count in kept.items())

        packed = sum(cost.packed_bytes(sizes[name], count, shared.get(name)) for name, count in kept.items())
        return Option(compression, money, found, amount("weights"), amount("flops"), packed, seconds)

    asked = [option(each) for each in compressions]
    between = np.geomspace(1.0, max(*compressions, 1.01), CURVE)
    curve = [option(float(each)) for each in between]
    everything = sum(weights.values()) if groups is None else sum(sizes.values())
    chance = damage.chance_rise(scan, classes)
    return Options(unit, weights, everything, asked, curve, chance, ready, bool(scan.together))


def table(options: Options) -> TextTable:
    """A column a budget: its size, the damage that the scan predicts, and the density of each tensor."""
    asked, total = options.asked, options.total
    rows = [
        ["weights kept", *(f"{each.kept:,}" for each in asked)],
        ["compression in weights", *(f"{total / each.kept:.2f}x" for each in asked)],
        ["FLOPs", *(f"{each.flops:,}" for each in asked)],
        ["bytes, packed", *(f"{each.bytes:,}" for each in asked)],
        ["damages composed by the power", *(f"{each.solution.held.power:g}" for each in asked)],
        ["predicted rise of the loss", *(_rise(each, options) for each in asked)],
        ["its 95% interval", *(_interval(each, options) for each in asked)],
        ["at most above the optimum", *(f"{each.solution.gap:.2g}" for each in asked)],
        ["solved in", *(f"{1000 * (options.seconds + each.seconds):.0f} ms" for each in asked)],
    ]
    for name, size in options.weights.items():
        rows.append([name, *(percent(each.solution.keep[name] / size, 2) for each in asked)])
    title = f"least predicted damage, by compression in {options.unit}"
    return TextTable(title, ["", *(f"{each.compression:g}x" for each in asked)], rows)


def bars(options: Options) -> list[str]:
    """The curve as lines of text under a title, with a note where the scan did not measure how damages compose."""
    lines = [f"predicted rise of the loss (nats) before retraining; a full bar is chance, {options.chance:.2f}"]
    for each in options.curve:
        length = round(BAR * min(1.0, each.solution.rise / options.chance))
        lines.append(f"{each.compression:8.2f}x {_rise(each, options):>8} {'#' * length}".rstrip())
    if not options.together:
        lines.append(
            "this scan pruned each tensor alone, so how damages compose is assumed: `secateur scan CONFIG "
            "prune.allocation=budget` measures it"
        )
    return lines


def _interval(option: Option, options: Options) -> str:
    low, high = option.solution.interval
    if low >= options.chance:
        return "chance"
    return f"{low:.3g} to {f'{high:.3g}' if high < options.chance else 'chance'}"


def _rise(option: Option, options: Options) -> str:
    """A predicted rise; beyond chance its size says nothing more."""
    return f"{option.solution.rise:.4f}" if option.solution.rise < options.chance else "chance"
