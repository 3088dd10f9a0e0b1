"""The driver's part of the sensitivity scan: which levels are known, which an engine must measure, and the results."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data.manifest import held_out
from pipeline.engine import Engine
from pipeline.network.groups import Groups
from pipeline.network.survey import Prunable
from pipeline.prune import allocation, channels, damage, patterns
from pipeline.prune.allocation import sigma
from pipeline.run.events import LevelMeasured, Progress, TogetherMeasured
from pipeline.run.layout import round_folder
from pipeline.run.records import (
    CHANNELS,
    DenseFigures,
    Figures,
    Joint,
    Level,
    Scan,
    ScanOrigin,
    TensorScan,
    TogetherRow,
)
from pipeline.run.state import Run, fingerprint
from pipeline.scan import racing, together
from pipeline.scan.known import Known, known, known_together
from pipeline.settings.config import Config, hashed
from pipeline.settings.pruning import Prune
from pipeline.settings.pruning import Scan as ScanSettings
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import load_data

DENSE = "dense/checkpoint"
# Settings that change what a level measures; those that only choose levels and tensors may differ between machines.
KEY_SETTINGS = {
    "data": ("channels", "resize", "size", "mean", "std", "decoder"),
    "model": ("factory", "kwargs"),
    "scan": ("samples", "interval", "hopeless", "bn_samples"),
    "prune": ("criterion", "statistics_samples", "pattern"),
}


@dataclass(frozen=True)
class Part:
    """What the scan prunes alone: a tensor with its weights, or a group with its channels; `size` counts them.

    `tensor` is None for a group.
    """

    name: str
    kind: str
    size: int
    tensor: Prunable | None = None


def parts(prunable: Sequence[Prunable], groups: Groups | None) -> list[Part]:
    """What a scan measures: the groups where whole channels are pruned, else the tensors."""
    if groups is None:
        return [Part(tensor.name, tensor.kind, tensor.weights, tensor) for tensor in prunable]
    channels.require_some(groups, "the scan")
    return [Part(name, CHANNELS, group.units) for name, group in groups.by_name.items()]


def measure(
    prunable: list[Prunable],
    groups: Groups | None,
    config: Config,
    engine: Engine,
    here: Run,
    progress: Progress,
    merged: Sequence[str] = (),
    after: int | None = None,
) -> Scan:
    """Measure every level that is not known yet and write scan/scan.json, or scan/after-N.json; returns what it holds.

    Levels of a scan that was stopped are known, and so are the levels in the files `merged`. These files must be of the
    same weights, data and settings. `after` scans the model of that finished round, whose masks stay applied. Raises
    UserError for a file that does not fit. `groups` are those of whole channels, where these are pruned.
    """
    source = DENSE if after is None else f"{round_folder(after)}/checkpoint"
    older = "trials.json" if after is None else f"after-{after}.trials.json"
    made_of = origin(source, config, here)
    scanned = parts(prunable, groups)
    names = [part.name for part in scanned]
    saved = checkpoint.load(here, source)
    living = _living(scanned, groups, saved)
    with known(here, made_of, older) as levels:
        for path in merged:
            _merge(path, made_of, names, levels)
        dense = _measure_missing(levels, living, config, engine, here, progress, source)
        curves = {name: levels.of(name) for name in names}
    found = Scan(
        samples=dense.samples,
        split="val",
        dense=DenseFigures(dense.top1, dense.loss),
        delta=config.scan.delta,
        tensors=tuple(
            part_scan(part, curves[part.name], saved, living[part.name], dense.top1, config.scan.delta)
            for part in scanned
        ),
        after=after,
        key=fingerprint(made_of.to_json()),
        made_of=made_of,
        data=load_data(config, here).identity,
    )
    if after is None and together_at(config.scan, config.prune):
        found = replace(found, together=measure_together(found, config, engine, here, progress))
    here.commit(found, "scan", "scan.json" if after is None else f"after-{after}.json")
    return found


def _living(scanned: Sequence[Part], groups: Groups | None, saved: Checkpoint) -> dict[str, int]:
    """How many weights, or channels, of each part are alive in a checkpoint; without masks all are."""
    if groups is None:
        return {each.name: int(saved.masks[each.name].sum()) if each.name in saved.masks else each.size
                for each in scanned}  # fmt: skip
    return {name: int(flags.sum()) for name, flags in groups.alive(saved.masks).items()}


def _measure_missing(
    levels: Known,
    living: Mapping[str, int],
    config: Config,
    engine: Engine,
    here: Run,
    progress: Progress,
    source: str,
) -> Figures:
    """Have the engine measure what is missing of each tensor, with so many `living` weights; returns the dense figures.

    Nothing that is done for a level grows with the number of those known.
    """
    wanted = {name: racing.next_levels(levels.of(name), config.scan, count) for name, count in living.items()}
    todo = {name: levels.of(name) for name in living if wanted[name]}
    total = levels.count + sum(map(len, wanted.values()))
    if config.scan.mode == "adaptive":
        total = max(total, len(living) * config.scan.max_levels)

    def on_level(name: str, level: Level) -> None:
        if levels.add(name, level):  # a trial that was lost and started again measures its first levels twice
            progress(LevelMeasured(name, level, levels.count, total))

    if todo or levels.dense is None:
        levels.set_dense(engine.scan(todo, config, here, on_level, source))
    assert levels.dense is not None
    return levels.dense


def together_at(scan: ScanSettings, prune: Prune) -> list[float]:
    """The densities at which all tensors are pruned together: none unless the allocation goes by them."""
    return [*scan.together] if allocation.of(prune).needs_together else []


def measure_together(
    scan: Scan, config: Config, engine: Engine, here: Run, progress: Progress
) -> tuple[TogetherRow, ...]:
    """The rows of all tensors pruned together, one an allocation, from the largest density down until the network
    guesses.

    Each row is written as it comes, so that a stopped scan can go on.
    """
    classes = load_data(config, here).num_classes
    wanted = together.allocations(scan, classes, together_at(config.scan, config.prune))
    measure, rows = None, list[TogetherRow]()
    with known_together(here, scan.made_of) as known:
        for density, by_power in wanted.items():
            named = {power: fingerprint(keep) for power, keep in by_power.items()}
            missing = {named[power]: keep for power, keep in by_power.items() if named[power] not in known.rows}
            if missing:
                measure = measure or engine.together(config, here, DENSE)
                for keep, seen in zip(missing.values(), measure([*missing.values()]), strict=True):
                    known.add(Joint(keep=keep, **vars(seen)))
            found = {power: known.rows[name] for power, name in named.items()}
            made = [TogetherRow(density=density, power=power, **vars(row)) for power, row in found.items()]
            rows += made
            best = damage.best_together(made)[density]
            progress(TogetherMeasured(density, best.rise, best.power))
            if damage.finite(best.rise) >= damage.chance_rise(scan, classes):
                break
    return tuple(rows)


def origin(source: str, config: Config, here: Run) -> ScanOrigin:
    """What a scan's numbers depend on. Two scans with the same origin can be joined."""
    weights, masks = (checkpoint.digest(here, source, name) for name in ("weights.safetensors", "masks.bin"))
    manifest = load_data(config, here)
    shards = manifest.splits["train" if manifest.holdout else "val"]
    held = held_out(shards) if manifest.holdout else None
    skipped = [shards.rows(number).skipped.tolist() for number, shard in enumerate(shards) if shard.skipped]
    everything, keys = hashed(config), KEY_SETTINGS
    if patterns.of(config.prune).channels:  # what stays dense decides what is a group
        keys = {**keys, "prune": (*keys["prune"], "include", "exclude")}
    # Before, a level's quality was the smallest weight that it keeps, whatever the weights were scored by.
    scored = {} if config.prune.criterion == "magnitude" else {"quality": "score"}
    return ScanOrigin(
        weights=fingerprint(weights, masks),
        data=fingerprint([shard.sha256 for shard in shards], held, *skipped),
        settings={
            **{key: everything[key] for key in ("seed", "task", "eval_precision") if key in everything},
            **scored,
            **{
                f"{part}.{key}": everything[part][key]
                for part, names in keys.items()
                for key in names
                if key in everything[part]
            },
        },
    )


def require_round(number: int, here: Run) -> None:
    """Raise UserError if the round is not finished."""

    def finished(number: int) -> bool:
        return here.has(round_folder(number), "metrics.json")

    if number < 1 or not finished(number):
        count = 0
        while finished(count + 1):
            count += 1
        known = f"rounds 1 to {count} are" if count else "no round is"
        raise UserError(f"--after {number}: {known} finished in '{here.root}'; `secateur run` goes on with the rounds")


def _merge(path: str, made_of: ScanOrigin, names: Collection[str], known: Known) -> None:
    """Add the levels of another machine's scan.json, and its dense network's figures, to those known."""
    try:
        document = storage.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--merge {path}: cannot be read as a scan.json: {error}") from error
    try:
        theirs = Scan.from_json(document, path)
    except UserError as error:
        raise UserError(f"--merge {path}: is not a scan.json that `secateur scan` wrote; give such files") from error
    if theirs.made_of != made_of:
        raise UserError(
            f"--merge {path}: is a scan of something else: {', '.join(_differences(made_of, theirs.made_of))}; only "
            "scans of the same weights, data and settings can be joined"
        )
    for tensor in theirs.tensors:
        if tensor.name in names:
            for level in tensor.levels:
                known.add(tensor.name, level)
    if known.dense is None:
        known.set_dense(Figures(theirs.dense.top1, theirs.dense.loss, theirs.samples))


def _differences(ours: ScanOrigin, theirs: ScanOrigin) -> list[str]:
    """What differs between two origins, in words."""
    found = [
        *(["its weights are others"] if ours.weights != theirs.weights else []),
        *(["its data are others"] if ours.data != theirs.data else []),
    ]
    return found + [
        f"{name} is {theirs.settings.get(name)!r} there and {value!r} here"
        for name, value in (dict.fromkeys(theirs.settings) | ours.settings).items()
        if theirs.settings.get(name) != value
    ]


def quality(levels: Sequence[Level], dense_top1: float, delta: float) -> float:
    """The largest quality whose drop stays within `delta`, read off a measured curve.

    The curve runs from quality 0 (dense, no drop) through the levels in falling density; where it first
    crosses `delta` the quality is interpolated between the two levels around the crossing.
    """
    previous_quality, previous_drop = 0.0, 0.0
    for level in sorted(levels, key=lambda level: -level.density):
        drop = dense_top1 - level.top1
        if drop > delta:
            share = (delta - previous_drop) / (drop - previous_drop)
            return previous_quality + share * (level.quality - previous_quality)
        previous_quality, previous_drop = level.quality, drop
    return previous_quality


def part_scan(
    part: Part, measured: Sequence[Level], saved: Checkpoint, living: int, dense_top1: float, delta: float
) -> TensorScan:
    """A part's curve from its levels; `saved` has the masks that stayed applied, of which `living` are True.

    A group of channels has no quality and no sigma. A tensor's quality is 0 where the very first level already loses
    more than delta. |w| / (q * std) needs q > 0, so half the lowest positive level is used instead.
    """
    levels = sorted(measured, key=lambda level: -level.density)
    if part.tensor is None:
        return _curve(part, levels, living, sigma=0.0, quality=0.0)
    found = quality(levels, dense_top1, delta)
    floor = next((level.quality / 2 for level in levels if level.quality > 0), 1e-6)
    weight, alive = saved.weights[part.name], saved.masks.get(part.name)
    std = sigma(weight if alive is None else weight[alive])
    return _curve(part, levels, living, sigma=std, quality=found if found > 0 else floor)


def _curve(part: Part, levels: Sequence[Level], living: int, *, sigma: float, quality: float) -> TensorScan:
    return TensorScan(
        name=part.name,
        kind=part.kind,
        weights=part.size,
        alive=living,
        sigma=sigma,
        method=", ".join(sorted({level.method for level in levels})),
        levels=tuple(levels),
        quality=quality,
    )
