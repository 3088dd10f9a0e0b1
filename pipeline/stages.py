"""A run from data to report, as its driver sees it: shards, dense, scan, rounds, final.

Each stage is skipped where its finished marker says that it was made from the same things. What needs several
processes is handed to an engine: this process alone or torchrun's (`LocalEngine`), or Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.data import shards, sources
from pipeline.engine import Engine, Work
from pipeline.export import bench
from pipeline.network.build import build_network
from pipeline.network.survey import Prunable
from pipeline.network.survey import survey as survey_network
from pipeline.prune import channels, round_plan
from pipeline.results import final
from pipeline.rounds import branch, comparison, outlook, preflight, same_data, timing
from pipeline.run import course, ended, log, machines
from pipeline.run.events import Busy, Event, Mirrored, Noted, Progress, ShardsCounted, StageBegun, Warned
from pipeline.run.layout import NO_ONNX
from pipeline.run.records import DataFacts, NoOnnx, Scan
from pipeline.run.result import Result
from pipeline.run.state import Run, fingerprint, open_run
from pipeline.scan import scan as scans
from pipeline.settings.config import Config, hashed
from pipeline.task.feed import Feed
from pipeline.tracking.mirror import Mirror, patience_s
from pipeline.train import session


@dataclass(frozen=True)
class Driver:
    """What the driver of a run holds: the settings, what runs work on processes, the run's folder, and who is told.

    `merged` are scan.json files of other machines, whose levels the scan takes.
    """

    config: Config
    engine: Engine
    run: Run
    progress: Progress
    merged: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """The run's network, as it is initialised."""
        manifest = session.load_data(self.config, self.run)
        return build_network(self.config.model, manifest.num_classes, self.config.seed)

    def prunable(self, network: nn.Module | None = None) -> list[Prunable]:
        """The prunable tensors of the run's network."""
        prune = self.config.prune
        return survey_network(network or self.network(), prune.include, prune.exclude)[0]

    def scan(self, after: int | None = None) -> Scan:
        """Measure the levels of a scan that are not known yet; returns the scan."""
        model = self.network()
        prunable, example = self.prunable(model), Feed.of(self.config).zeros(2, torch.device("cpu"))
        groups = channels.groups_of(model, prunable, example, self.config.prune)
        return scans.measure(prunable, groups, self.config, self.engine, self.run, self.progress, self.merged, after)


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    `settings` gives what decides what the stage makes, beyond the stages before it: a change makes the stage anew.
    `drive` is what the driver does. `gives` are files without which the stage is not taken for finished; `again` tells
    whether it has more to do although it is finished.
    """

    name: str
    title: str
    settings: Callable[[Driver], Sequence[Any]]
    drive: Callable[[Driver], None]
    gives: tuple[str, ...] = ()
    again: Callable[[Driver], bool] = lambda driver: False


def on_workers(
    name: str, title: str, settings: Callable[[Driver], Sequence[Any]], function: str, gives: tuple[str, ...] = ()
) -> Stage:
    """A stage whose work all workers do together: a function of a Session, as "package.module:name"."""
    work = Work(name, function)

    def drive(driver: Driver) -> None:
        driver.engine.train(work, driver.config, driver.run, driver.progress)

    return Stage(name, title, settings, drive, gives)


def carry_out(stages: Sequence[Stage], driver: Driver) -> None:
    """Check everything that can be checked, then carry out stage after stage.

    One that is finished, and was made from the same things, is skipped. Raises UserError (the user can mend it) or
    RunStopped; in both cases the state on disk is kept and the same command goes on from it.
    """
    config, run = driver.config, driver.run
    driver.progress(Noted("settings, data and network are being checked"))
    same_data.settle(config, run, lambda: fingerprint(SHARDS.name, *SHARDS.settings(driver)))
    preflight.check(config, run)
    made_from: list[str] = []
    for number, stage in enumerate(stages, start=1):
        started = time.monotonic()
        made_from = [fingerprint(stage.name, *made_from, *stage.settings(driver))]
        there = run.finished(stage.name, made_from[0]) and all(run.has(file) for file in stage.gives)
        if there and not stage.again(driver):
            driver.progress(StageBegun(stage.name, stage.title, True, number, len(stages)))
        else:
            driver.progress(StageBegun(stage.name, stage.title, False, number, len(stages)))
            stage.drive(driver)
            run.finish(stage.name, made_from[0], time.monotonic() - started)
            if stage in (SHARDS, LATENCY):
                preflight.check_again(config, run)
        if stage is SHARDS:
            tensors = len(driver.prunable()) if SCAN in stages else 0
            counts = preflight.known_counts(config.data, config.seed, run)
            driver.progress(outlook.outline(config, counts, [each.name for each in stages], tensors))


# Settings of data that change how it is read, but not what is read.
HOW_READ = {"cache_bytes", "cache_dir", "cache_disk_bytes", "decode_threads"}
# The groups of settings that decide what the dense network becomes.
DENSE_SETTINGS = (
    "seed", "threads", "device", "reproducible", "compile", "eval_precision", "exchange_precision", "task", "model",
    "data", "dense",
)  # fmt: skip
# Settings of prune that decide what a scan measures.
SCAN_SETTINGS = {"criterion", "statistics_samples", "include", "exclude", "pattern"}
# The settings that decide which bytes `shards build` writes.
BUILD_SETTINGS = {
    "source", "root", "classes", "class_index", "val_fraction", "test_fraction", "shard_samples", "shrink", "quality",
    "follow_links",
}  # fmt: skip


def _shards_settings(driver: Driver) -> list[Any]:
    config = driver.config
    if sources.of(config.data).in_place:
        return [shards.load_manifest(session.data_root(config, driver.run)).made_from]
    settings = hashed(config)["data"]
    return [config.seed, {name: settings[name] for name in BUILD_SETTINGS if name in settings}]


def _shards(driver: Driver) -> None:
    """Build the run's shards, or take the user's, and write down what they hold."""
    config, run = driver.config, driver.run
    if sources.of(config.data).in_place:
        manifest = shards.load_manifest(session.data_root(config, run))
    else:

        def written(text: str, done: int, total: int) -> None:
            run.check_fence()  # the shards themselves come out the same, whoever writes them
            driver.progress(ShardsCounted(text, done, total))

        spread = driver.engine.spread(config, run)
        manifest = shards.build(config.data, config.seed, run.path("shards"), written, spread)
    sizes = manifest.sizes
    facts = DataFacts(
        train=sizes["train"],
        val=sizes["val"],
        test=sizes["test"],
        classes=manifest.num_classes,
        present=len(manifest.classes),
        source=config.data.source,
        root=config.data.root,
        data=manifest.identity,
    )
    run.commit(facts, "data.json")


def _dense_settings(driver: Driver) -> list[Any]:
    everything = hashed(driver.config)
    settings = {key: everything[key] for key in DENSE_SETTINGS if key in everything}
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in HOW_READ}
    source = driver.config.start.source
    return [settings] if source is None else [source, settings]


def _dense(driver: Driver) -> None:
    """Train the dense network, or take it and the round to begin with from `start.from`."""
    config = driver.config
    if config.start.source is None:
        driver.engine.train(DENSE_WORK, config, driver.run, driver.progress)
        return
    branch.take(config, driver.run, driver.prunable())
    text = f"taken from {config.start.source}: the dense network, and what the rounds begin with"
    driver.progress(Noted(text))


def _latency_settings(driver: Driver) -> list[Any]:
    """What a table is measured of. A table that a file gives is made anew where the file is another one."""
    everything, target = hashed(driver.config), driver.config.target
    prune = {key: everything["prune"][key] for key in ("include", "exclude")}
    device = [driver.config.device, driver.config.threads, target.latency_batch, target.latency_table]
    return [everything["model"], {key: everything["data"][key] for key in ("channels", "size")}, prune, device]


def _scan_settings(driver: Driver) -> list[Any]:
    everything = hashed(driver.config)
    given = {key: value for key, value in everything["prune"].items() if key in SCAN_SETTINGS}
    return [
        {"scan": everything["scan"] | {"together": scans.together_at(driver.config.scan, driver.config.prune)}, **given}
    ]


def _scan(driver: Driver) -> None:
    """Scan every prunable tensor, or group of channels; levels already known, here or in the files `merged`, are not
    measured again.
    """
    driver.scan()


def rounds_settings(driver: Driver) -> list[Any]:
    """The settings that decide what the rounds make."""
    everything = hashed(driver.config)
    export = {"export": everything["export"]} if driver.config.export.codebook_bits else {}
    return [{key: everything[key] for key in ("prune", "retrain", "target")} | export]


def _final_settings(driver: Driver) -> list[Any]:
    """The licence is one of them where it is given: a finished run that is told of one gets another model card."""
    config = driver.config
    return [config.target.margin, *([config.model.licence] if config.model.licence else [])]


def _final(driver: Driver) -> None:
    """Export the pruned network, judge it, and write result.json and the report."""
    final.finish(driver.config, driver.run, driver.prunable(), time.monotonic())


DENSE_WORK = Work("dense", "pipeline.rounds.method:dense")
SHARDS = Stage("shards", "shards", _shards_settings, _shards)
DENSE = Stage(
    "dense", "dense network", _dense_settings, _dense, gives=("dense/metrics.json", "dense/checkpoint/manifest.json")
)
SCAN = Stage(
    "scan",
    "sensitivity scan",
    _scan_settings,
    _scan,
    gives=("scan/scan.json",),
    again=lambda driver: bool(driver.merged),
)
LATENCY = on_workers(
    "latency", "latency table", _latency_settings, "pipeline.rounds.timing:measure", gives=(timing.FILE,)
)
ROUNDS = on_workers(
    "rounds",
    "rounds",
    rounds_settings,
    "pipeline.rounds.method:prune",
    gives=(*comparison.GIVES, "final/activity.json"),
)
FINAL = Stage("final", "final", _final_settings, _final, gives=final.GIVES)


def up_to(config: Config, *ends: Stage) -> list[Stage]:
    """The stages of a run that ends with `ends`, in their order; the scan is one of them where something needs it.

    So is the latency table, before the dense network is trained: it tells which targets can be reached.
    """
    scan = [SCAN] if round_plan.needs_scan(config.prune, config.target) or SCAN in ends else []
    table = [LATENCY] if config.target.budget == "latency" and ROUNDS in ends else []
    return [SHARDS, *table, DENSE, *scan, *(stage for stage in ends if stage is not SCAN)]


def run(config: Config, engine: Engine, progress: Progress) -> Result:
    """Carry a run to its end and return its result.json. Raises as `carry_out` does."""
    with open_run(config, lambda text: progress(Noted(text))) as here, logged(engine, here, progress) as heard:
        mirror, patience = None, patience_s()
        if config.tracking.enabled:
            mirror = Mirror(here.root, config, lambda text: heard(Warned(text)), lambda lag: heard(Mirrored(lag)))
        try:
            with ended.noted(here), machines.watched(heard, config.tracking.watches_machines):
                carry_out(up_to(config, ROUNDS, FINAL), Driver(config, engine, here, heard))
            result = here.load(Result, "result.json")
            if mirror is not None and config.tracking.models != "none":
                export_for_mlflow(here, heard)
            if mirror is not None and result.mlflow is None:
                started = time.monotonic()
                synced = mirror.flush(patience)
                patience = max(0.0, patience - (time.monotonic() - started))
                if synced is not None:
                    result = final.update(here, mlflow=synced.place)
        finally:
            if mirror is not None:
                mirror.close(patience)
        return result


def export_for_mlflow(here: Run, progress: Progress) -> None:
    """Write final/model.onnx, which MLflow's model is made of, unless it is there.

    A network may have none. It is then written down why, and tried again only with another torch.
    """
    if here.has("final", "model.onnx"):
        return
    if here.has(NO_ONNX) and here.load(NoOnnx, NO_ONNX).torch == torch.__version__:
        return
    why = bench.write_model_onnx(here)
    if why is not None:
        here.commit(NoOnnx(why, torch.__version__), NO_ONNX)
        progress(Warned(f"MLflow gets this network as tensors, which only secateur loads, and not as ONNX: {why}"))


@contextmanager
def logged(engine: Engine, here: Run, progress: Progress) -> Iterator[Progress]:
    """A progress function for a run's driver: events also go to the driver's log, the run's course and the engine.

    Those of machines go to their journal alone.
    """

    def tell(text: str) -> None:
        progress(Warned(text))

    with (
        log.kept(here, log.driver_name(here), tell) as kept,
        course.kept(here, tell) as curves,
        machines.kept(here, tell) as busy,
    ):

        def heard(event: Event) -> None:
            if isinstance(event, Busy):
                busy.add(event)
                return
            kept(event)
            engine.hear(event)
            curves(event)
            progress(event)

        yield heard


def scan(
    config: Config, engine: Engine, here: Run, progress: Progress, merged: Sequence[str] = (), after: int | None = None
) -> Scan:
    """Only the scan, with the stages before it, or of a finished round's model."""
    with logged(engine, here, progress) as heard:
        driver = Driver(config, engine, here, heard, tuple(merged))
        if after is not None:
            scans.require_round(after, here)
            heard(StageBegun(SCAN.name, SCAN.title))
            return driver.scan(after)
        carry_out(up_to(config, SCAN), driver)
        return here.load(Scan, "scan", "scan.json")
