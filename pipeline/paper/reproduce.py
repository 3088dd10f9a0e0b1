"""`reproduce`: the runs behind the paper's tables 1 to 3 and figures 4 to 7, and the pages that compare them.

Every seed is an ordinary run under runs/reproduce/, so it resumes and is skipped when finished; the tables and figures
are made from what the runs' own files say.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.numpy import load as load_safetensors

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.cli import commands
from pipeline.cli.console import Display, show_tables
from pipeline.engine import Engine
from pipeline.paper import curves, figure5, figures, printed
from pipeline.paper import tables as results
from pipeline.paper.tables import SeedRun
from pipeline.prune import round_plan
from pipeline.results import final, plots
from pipeline.results.figures import to_png
from pipeline.rounds import preflight
from pipeline.run import state
from pipeline.run.events import Progress
from pipeline.run.records import Scan
from pipeline.settings.config import Config
from pipeline.train.world import configure_process

ALL_NETWORKS = ",".join(printed.NETWORKS)
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "paper"

Target = Annotated[str, typer.Argument(metavar="TARGET", help="lenet-300-100, lenet-5, figure5 or all.")]
DataRoot = Annotated[str | None, typer.Option("--data", help="Folder of MNIST's idx files; sets data.root.")]
Seeds = Annotated[str, typer.Option(help="Seeds of the networks' runs; figure5 takes the first.")]
RunsDir = Annotated[str | None, typer.Option(help="Folder that holds runs; sets runs_dir.")]
Networks = Annotated[str, typer.Option(help="The networks of figure5.")]
Configs = Annotated[Path, typer.Option(help="Folder with NETWORK.yaml and figure5-NETWORK.yaml.")]


@dataclass(frozen=True)
class Job:
    """One page of results, `folder`, and the runs that it needs: by seed, or for figure 5 by (network, regulariser)."""

    name: str
    folder: str
    runs: dict[Any, Config]


def jobs(
    target: str,
    overrides: Sequence[str],
    data: str | None,
    seeds: str,
    runs_dir: str | None,
    networks: str,
    configs: Path,
    checked: Callable[[str, list[str]], list[str]] = lambda _, overrides: overrides,
) -> list[Job]:
    """What a command has to do; `checked` may refuse settings before they are used.

    Raises UserError for an unknown name or seed, or where no data is named.
    """
    known: dict[str, Sequence[str]] = {name: (name,) for name in (*printed.NETWORKS, "figure5")}
    names = lookup({**known, "all": tuple(known)}, target, "TARGET")
    numbers = _seeds(seeds)
    settings = [*overrides, *_data_root(overrides, data), *([f"runs_dir={runs_dir}"] if runs_dir else [])]
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

    figure = [network.strip() for network in networks.split(",")]
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
            configure_process(config)
            runs.append(_seed_run(seed, config, stages.run(config, engine, display)))
    found = results.aggregate(job.name, network, runs)
    config = next(iter(job.runs.values()))
    first = storage.join(config.runs_dir, config.name)
    drawn = [_figure7(first)]
    if round_plan.needs_scan(config.prune, config.target):
        drawn.insert(0, _figure6(first))
    if job.name == "lenet-300-100":
        drawn.insert(0, _figure4(first, config.data.size))
    for number, png, _ in drawn:
        storage.write_bytes(storage.join(job.folder, f"figure{number}.png"), png)
    texts = [(number, f"figure{number}.png", text) for number, _, text in drawn]
    _write(job, found, results.markdown(found, texts, command))
    show_tables(results.tables(found), [results.conclusion(found), *results.notes(found)], _page(job))


def _seed_run(seed: int, config: Config, result: dict[str, Any]) -> SeedRun:
    """A finished run with what its result.json does not hold: each layer's number of outputs, where Act% was taken."""
    root = state.run_root(config)
    weights = load_safetensors(storage.read_bytes(storage.join(root, "final", "model.safetensors")))
    activity = storage.read_json(storage.join(root, "final", "activity.json"))
    outputs = {
        row["name"]: row["flops"] * len(weights[row["name"]]) // (2 * row["weights"]) for row in result["layers"]
    }
    return SeedRun(seed, config.name, result, outputs, {row["name"]: row["measured"] for row in activity})


Drawn = tuple[int, bytes, str]  # the figure's number, PNG, and what it shows in words


def _figure4(root: str, size: int) -> Drawn:
    weights = load_safetensors(storage.read_bytes(storage.join(root, "final", "model.safetensors")))
    kept = weights["fc1.weight"] != 0
    lie = figures.centre(kept, size)
    text = (
        f"{lie['middle_share']:.0%} of the kept weights read the middle of the image, {lie['middle_area']:.0%} of its "
        f"pixels; {lie['empty_pixels']} of {lie['pixels']} pixels have no weight left, and "
        f"{int(np.count_nonzero(lie['rows']))} of the {len(lie['rows'])} rows of pixels have a band."
    )
    return 4, to_png(figures.bands(kept, size)), text


def _figure6(root: str) -> Drawn:
    file = storage.join(root, "scan", "scan.json")
    scan = Scan.from_json(storage.read_json(file), file)
    ranked = sorted(scan.tensors, key=lambda tensor: tensor.quality)
    names = ", ".join(f"{tensor.name.removesuffix('.weight')} ({tensor.quality:.2f})" for tensor in ranked)
    text = f"from the most to the least sensitive, with the quality at a drop of {100 * scan.delta:g} points: {names}."
    return 6, to_png(plots.sensitivity(scan)), text


def _figure7(root: str) -> Drawn:
    tensors = storage.read_json(storage.join(root, "final", "histograms.json"))["tensors"]
    largest = max(tensors, key=lambda tensor: sum(tensor["before"]))
    figure = plots.histograms({"tensors": [largest]})[largest["name"]]
    return 7, to_png(figure), f"{largest['name']}, dense and after the last round."


def _figure5(job: Job, engine: Engine, command: str) -> None:
    """The five curves of each network."""
    measured: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    with Display() as display:
        for (network, regulariser), config in job.runs.items():
            display.line(f"figure 5: {printed.NETWORKS[network].title}, {regulariser.upper()}")
            configure_process(config)
            found = figure5_run(config, engine, display)
            measured.setdefault(network, {})[regulariser] = found
            facts[network] = {"seed": config.seed, "samples": found["val"]}
    parts = []
    for network, each in measured.items():
        part = curves.assemble(network, **facts[network], measured=each)
        part["seconds"] = sum(found["seconds"] for found in each.values())
        picture = figures.tradeoff(part["curves"], printed.NETWORKS[network].title)
        storage.write_bytes(storage.join(job.folder, f"figure5-{network}.png"), to_png(picture))
        parts.append(part)
    result = {"name": job.name, "networks": parts}
    _write(job, result, curves.markdown(result, {n: f"figure5-{n}.png" for n in measured}, command))
    said = [f"{printed.NETWORKS[part['network']].title}: {text}" for part in parts for text in curves.sentences(part)]
    show_tables([curves.table(part) for part in parts], said, _page(job))


def figure5_run(config: Config, engine: Engine, progress: Progress) -> dict[str, Any]:
    """The stages of one regulariser's run; returns its measurements, val's samples, and seconds."""
    with state.open_run(config) as here:
        stages.carry_out(stages.up_to(config, figure5.FIGURE5), stages.Driver(config, engine, here, progress))
        times = [final.stage_seconds(here, stage) for stage in ("shards", "dense", "scan", "figure5")]
        seconds = sum(each for each in times if each is not None)
        return {**figure5.read(config, here), "val": here.read("data.json")["val"], "seconds": seconds}


def _write(job: Job, result: dict[str, Any], page: str) -> None:
    storage.write_json(storage.join(job.folder, "result.json"), result)
    storage.write_bytes(_page(job), page.encode())


def _page(job: Job) -> str:
    return storage.join(job.folder, "reproduce.md")
