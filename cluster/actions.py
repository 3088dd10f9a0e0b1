"""What the commands of `secateur` do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster import connect
from cluster.engine import RayEngine
from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.base.spread import processes
from pipeline.cli import commands
from pipeline.cli.console import Display, show_bench, show_scan
from pipeline.data import push, shards
from pipeline.export.bench import parse_batches
from pipeline.paper import reproduce as paper
from pipeline.results import report as reports
from pipeline.run import state
from pipeline.run.events import ShardsCounted
from pipeline.run.state import config_of
from pipeline.settings.config import load_config


def run(config: str, overrides: list[str], trust_code: bool) -> None:
    """A whole run."""
    commands.run(commands.load(config, _checked(config, overrides), trust_code=trust_code), RayEngine())


def scan(config: str, overrides: list[str], after: int | None, merge: list[str], trust_code: bool) -> None:
    """The scan of a run, after a round or of its dense network; `merge` names levels of other machines."""
    files = [*merge, *(part for part in overrides if "=" not in part)] if merge else []
    overrides = [part for part in overrides if part not in files]
    loaded = commands.load(config, _checked(config, overrides), trust_code=trust_code)
    engine = RayEngine()
    with Display() as display, state.open_run(loaded) as here:
        try:
            found = stages.scan(loaded, engine, here, display, files, after)
        finally:
            engine.close()
    show_scan(found)


def reproduce(wanted: paper.Wanted, overrides: list[str], typed: str) -> None:
    """The runs behind a target of the paper, and its pages."""
    paper.carry_out(paper.jobs(wanted, overrides, _checked), RayEngine(), typed)


def report(run_dir: str) -> str:
    """Write report.html of a finished run again; where it is."""
    config_of(run_dir)
    if not storage.exists(storage.join(run_dir, "result.json")):
        raise UserError(f"run '{run_dir}' has no result.json yet: run the command that started it again to finish it")
    return reports.write(run_dir)


def bench_table(given: str, overrides: list[str], path: str, trust_code: bool) -> None:
    """The latency table of the network of a config, or of a run, on this machine."""
    if storage.exists(storage.join(given, "config.yaml")):
        given = storage.join(given, "config.yaml")
    print(commands.bench_table(given, overrides, path, trust_code=trust_code))


def bench(run_dir: str, overrides: list[str], repeats: int, batches: str, trust_code: bool) -> None:
    """Latency of a finished run's networks on this machine."""
    show_bench(commands.bench(run_dir, repeats, parse_batches(batches), trust_code))


def ui(runs_dir: Path, port: int) -> None:
    """Become MLflow's UI for the runs of a folder."""
    database = runs_dir.resolve() / "mlflow.db"
    if not database.is_file():
        raise UserError(
            f"'{database}' does not exist: no run has been tracked there yet; give the runs_dir of your runs"
        )
    store = ["--backend-store-uri", f"sqlite:///{database}"]
    command = [sys.executable, "-m", "mlflow", "ui", *store, "--port", str(port)]
    print(f"http://127.0.0.1:{port}", flush=True)
    os.execv(command[0], command)  # Ctrl-C and SIGTERM then reach the server itself


def build_shards(config: str, overrides: list[str], out: str, workers: int | None) -> None:
    """Shards of a config's data."""
    loaded = commands.load(config, overrides, trust_code=True)  # no network is built here
    with Display() as display:
        spread = processes(workers or loaded.data.build_workers)
        made = shards.build(loaded.data, loaded.seed, out, _counting(display), spread)
    _describe(made)


def index_shards(
    root: str, label: str, classes: int | None, val_fraction: float, seed: int, skip_bad: bool, workers: int | None
) -> None:
    """A manifest of shards that another program wrote."""
    with Display() as display:
        made, notes = shards.index(
            root,
            label=label,
            val_fraction=val_fraction,
            seed=seed,
            num_classes=classes,
            progress=_counting(display),
            skip_bad=skip_bad,
            spread=processes(workers),
        )
    for note in notes:
        print(f"warning: {note}")
    _describe(made)


def verify_shards(root: str, workers: int | None) -> None:
    """Shards against their manifest."""
    with Display() as display:
        problems = shards.verify(root, _counting(display), processes(workers))
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} problems in '{root}': replace the shards named above, or index again")
    print("all shards are as their manifest says")


def push_shards(source: str, target: str) -> None:
    """Shards to S3."""
    with Display() as display:
        sent, there = push.push(source, target, _counting(display))
    print(f"{sent} shards uploaded, {there} were there: data.source=shards data.root={target}")


def _counting(display: Display) -> shards.Progress:
    return lambda text, done, total: display(ShardsCounted(text, done, total))


def _describe(manifest: shards.Manifest) -> None:
    parts = ", ".join(
        f"{split}: {parts.used.sum():,} samples in {len(parts)} shards" for split, parts in manifest.splits.items()
    )
    held = f"; val: {manifest.sizes['val']:,} samples held out of train" if manifest.holdout else ""
    print(f"{parts}{held}; {manifest.num_classes} classes")


def _checked(config: str, overrides: list[str]) -> list[str]:
    """Refuse relative paths in a job, whose working directory is gone when it ends."""
    if connect.in_job():
        connect.require_shared_paths(
            load_config(config, overrides),
            "a job's working directory is temporary and the next submission does not see it",
        )
    return overrides
