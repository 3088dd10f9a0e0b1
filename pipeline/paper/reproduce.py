"""`reproduce`: the runs behind the paper's tables 1 to 3 and figures 4 to 7, and the pages that compare them.

Every seed is an ordinary run under runs/reproduce/, so it resumes, and is skipped when finished. The tables and figures
are made from the runs' own files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.base.record import Record
from pipeline.cli import commands
from pipeline.cli.console import show_tables
from pipeline.cli.display import Display
from pipeline.engine import Engine
from pipeline.paper import curves, figure5, figures, printed, seeds, tables
from pipeline.paper.arguments import ALL_NETWORKS, CONFIGS
from pipeline.paper.curves import Figure5, Measured
from pipeline.paper.seeds import SeedRun
from pipeline.prune import round_plan
from pipeline.results import final, plots
from pipeline.results.figures import to_png
from pipeline.rounds import preflight
from pipeline.run import state
from pipeline.run.contents import Contents, read
from pipeline.run.events import Progress
from pipeline.run.result import Result
from pipeline.settings.config import Config
from pipeline.train.world import configure_process


@dataclass(frozen=True)
class Job:
    """One page of results, `folder`, and the runs that it needs: by seed, or for figure 5 by (network, regulariser)."""

    name: str
    folder: str
    runs: dict[Any, Config]


@dataclass(frozen=True)
class Wanted:
    """What a command asks for: its target and options as they were typed."""

    target: str
    data: str | None = None
    seeds: str = "0,1,2"
    runs_dir: str | None = None
    networks: str = ALL_NETWORKS
    configs: Path = CONFIGS


def jobs(
    wanted: Wanted,
    overrides: Sequence[str],
    checked: Callable[[str, list[str]], list[str]] = lambda _, overrides: overrides,
) -> list[Job]:
    """What a command has to do; `checked` may refuse settings before they are used.

    Raises UserError for an unknown name or seed, or where no data is named.
    """
    known: dict[str, Sequence[str]] = {name: (name,) for name in (*printed.NETWORKS, "figure5")}
    names = lookup({**known, "all": tuple(known)}, wanted.target, "TARGET")
    numbers, configs = _seeds(wanted.seeds), wanted.configs
    settings = [*overrides, *_data_root(overrides, wanted.data)]
    settings += [f"runs_dir={wanted.runs_dir}"] if wanted.runs_dir else []
    for override in overrides:
        if override.startswith(("seed=", "name=")):
            raise UserError(f"'{override}': the runs are named by their seeds; use --seeds instead")
        if override.startswith(("start.", "target.mode=no-loss")):
            raise UserError(f"'{override}': the paper's tables are of runs from the beginning to a size; leave it out")

    def load(name: str) -> Config:
        path = configs / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"--configs={configs}: there is no {name}.yaml; give the folder configs/paper of a clone")
        return commands.load(path, checked(str(path), settings))

    figure = [network.strip() for network in wanted.networks.split(",")]
    return [
        _figure5_job(load, figure, numbers[0]) if name == "figure5" else _network_job(load, name, numbers)
        for name in names
    ]


def _network_job(load: Callable[[str], Config], name: str, seeds: Sequence[int]) -> Job:
    config = load(name)
    folder = storage.join(config.runs_dir, "reproduce", name)
    return Job(name, folder, {seed: _of_seed(config, folder, name, seed) for seed in seeds})


def _figure5_job(load: Callable[[str], Config], networks: Sequence[str], seed: int) -> Job:
    runs = {}
    for network in networks:
        lookup(printed.NETWORKS, network, "--networks")
        config = load(f"figure5-{network}").model_copy(update={"seed": seed})
        folder = storage.join(config.runs_dir, "reproduce", "figure5")
        for regulariser in figure5.REGULARISERS:
            where = storage.join(folder, network)
            runs[network, regulariser] = figure5.variant(config, regulariser, where)
    return Job("figure5", folder, runs)


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise UserError(f"--seeds={text} must be different whole numbers with commas between, as in 0,1,2")
    return [int(part) for part in parts]


def _data_root(overrides: Sequence[str], data: str | None) -> list[str]:
    """The override that says where MNIST is, unless the user's own does."""
    if data is not None:
        return [f"data.root={data}"]
    if any(override.startswith(("data.root=", "data.source=")) for override in overrides):
        return []
    where = os.environ.get("SECATEUR_DATA")
    if where and (Path(where) / "mnist").is_dir():
        return [f"data.root={Path(where) / 'mnist'}"]
    raise UserError(
        "MNIST: neither --data nor data.root is given, and SECATEUR_DATA names no folder with mnist/ in it: add "
        "--data PATH, the folder of the four idx files"
    )


def _of_seed(config: Config, folder: str, name: str, seed: int) -> Config:
    """The run of one seed; in MLflow it lies with the other runs of runs_dir, in an experiment of its own."""
    tracking = config.tracking
    if tracking.uri is None and "://" not in config.runs_dir:
        tracking = tracking.model_copy(update={"uri": f"sqlite:///{storage.join(config.runs_dir, 'mlflow.db')}"})
    tracking = tracking.model_copy(update={"experiment": f"{tracking.experiment}/reproduce/{name}"})
    return config.model_copy(update={"name": f"seed-{seed}", "runs_dir": folder, "seed": seed, "tracking": tracking})


def carry_out(wanted: Sequence[Job], engine: Engine, command: str) -> None:
    """Run what is missing, then write and print each job's result.json and reproduce.md.

    One run of each network is checked before the first one begins. Raises UserError where it will not do.
    """
    try:
        for job in wanted:
            for config in {run.model.factory: run for run in job.runs.values()}.values():
                preflight.check(config)
        for job in wanted:
            work = _figure5 if job.name == "figure5" else _network
            work(job, engine, command)
    finally:
        engine.close()


def _network(job: Job, engine: Engine, command: str) -> None:
    """Tables 1 and 2 or 3, figures 4, 6 and 7 of one network."""
    network = printed.NETWORKS[job.name]
    runs = []
    with Display() as display:
        for seed, config in job.runs.items():
            display.line(f"{network.title}, seed {seed}")
            configure_process(config.threads, config.reproducible)
            runs.append(_seed_run(seed, config.name, stages.run(config, engine, display), read(state.run_root(config))))
    found = seeds.aggregate(job.name, network, runs)
    config = next(iter(job.runs.values()))
    first = read(state.run_root(config))
    drawn = [_figure7(first)]
    if round_plan.needs_scan(config.prune, config.target):
        drawn.insert(0, _figure6(first))
    if job.name == "lenet-300-100":
        drawn.insert(0, _figure4(first, config.data.size))
    for number, png, _ in drawn:
        storage.write_bytes(storage.join(job.folder, f"figure{number}.png"), png)
    texts = [(number, f"figure{number}.png", text) for number, _, text in drawn]
    _write(job, found, tables.markdown(found, texts, command))
    show_tables(tables.tables(found), [tables.conclusion(found), *tables.notes(found)], _page(job))


def _seed_run(seed: int, name: str, result: Result, run: Contents) -> SeedRun:
    """A finished run with what its result.json does not hold: each layer's number of outputs, where Act% was taken."""
    weights = _final_weights(run)
    outputs = {
        layer.name: (layer.flops or 0) * len(weights[layer.name]) // (2 * layer.weights) for layer in result.layers
    }
    return SeedRun(seed, name, result, outputs, {row.name: row.measured for row in run.activity})


def _final_weights(run: Contents) -> dict[str, NDArray[Any]]:
    return load_safetensors(storage.read_bytes(storage.join(run.path, "final", "model.safetensors")))


Drawn = tuple[int, bytes, str]  # the figure's number, PNG, and what it shows in words


def _figure4(run: Contents, size: int) -> Drawn:
    kept = _final_weights(run)["fc1.weight"] != 0
    lie = figures.centre(kept, size)
    text = (
        f"{lie.middle_share:.0%} of the kept weights read the middle of the image, {lie.middle_area:.0%} of its "
        f"pixels; {lie.empty_pixels} of {lie.pixels} pixels have no weight left, and "
        f"{int(np.count_nonzero(lie.rows))} of the {len(lie.rows)} rows of pixels have a band."
    )
    return 4, to_png(figures.bands(kept, size)), text


def _figure6(run: Contents) -> Drawn:
    scan = run.scan
    assert scan is not None, "a run whose allocation needs a scan has one"
    ranked = sorted(scan.tensors, key=lambda tensor: tensor.quality)
    names = ", ".join(f"{tensor.name.removesuffix('.weight')} ({tensor.quality:.2f})" for tensor in ranked)
    text = f"from the most to the least sensitive, with the quality at a drop of {100 * scan.delta:g} points: {names}."
    return 6, to_png(plots.sensitivity(scan)), text


def _figure7(run: Contents) -> Drawn:
    assert run.histograms is not None, "a finished run has histograms"
    largest = max(run.histograms.tensors, key=lambda tensor: sum(tensor.before))
    return 7, to_png(plots.histogram(largest)), f"{largest.name}, dense and after the last round."


def _figure5(job: Job, engine: Engine, command: str) -> None:
    """The five curves of each network."""
    measured: dict[str, dict[str, Measured]] = {}
    of_network: dict[str, int] = {}
    with Display() as display:
        for (network, regulariser), config in job.runs.items():
            display.line(f"figure 5: {printed.NETWORKS[network].title}, {regulariser.upper()}")
            configure_process(config.threads, config.reproducible)
            measured.setdefault(network, {})[regulariser] = figure5_run(config, engine, display)
            of_network[network] = config.seed
    parts = []
    for network, each in measured.items():
        part = curves.assemble(network, of_network[network], each)
        picture = figures.tradeoff(part.curves, printed.NETWORKS[network].title)
        storage.write_bytes(storage.join(job.folder, f"figure5-{network}.png"), to_png(picture))
        parts.append(part)
    result = Figure5(job.name, tuple(parts))
    _write(job, result, curves.markdown(result, {n: f"figure5-{n}.png" for n in measured}, command))
    said = [f"{printed.NETWORKS[part.network].title}: {text}" for part in parts for text in curves.sentences(part)]
    show_tables([curves.table(part) for part in parts], said, _page(job))


def figure5_run(config: Config, engine: Engine, progress: Progress) -> Measured:
    """The stages of one regulariser's run; returns what it measured."""
    with state.open_run(config) as here:
        stages.carry_out(stages.up_to(config, figure5.FIGURE5), stages.Driver(config, engine, here, progress))
        times = [final.stage_seconds(here, stage) for stage in ("shards", "dense", "scan", "figure5")]
        seconds = sum(each for each in times if each is not None)
        points = len(round_plan.densities(config.prune, config.target))
        return figure5.read(here, points, iterative=config.retrain.l1 == 0, seconds=seconds)


def _write(job: Job, result: Record, page: str) -> None:
    storage.write_json(storage.join(job.folder, "result.json"), result.to_json())
    storage.write_bytes(_page(job), page.encode())


def _page(job: Job) -> str:
    return storage.join(job.folder, "reproduce.md")
