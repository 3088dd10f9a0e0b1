"""What the command lines do, with Ray (`secateur`, `python -m cluster`) or without (`python -m pipeline`)."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.base.record import plain
from pipeline.cli import plan as planning
from pipeline.cli.console import show_plan, show_result, show_tables
from pipeline.cli.display import Display
from pipeline.cli.messages import make_console
from pipeline.engine import Engine
from pipeline.export.bench import Bench, bench_run
from pipeline.export.latency import LEAST
from pipeline.export.load import require_known_code
from pipeline.network.build import build_network
from pipeline.results import budgets, figures, final, plots
from pipeline.results import report as reports
from pipeline.rounds import capacity, idle, outlook, preflight, timing
from pipeline.run import lease
from pipeline.run.records import DataFacts
from pipeline.run.result import Result
from pipeline.run.state import Run, as_begun, config_of, open_run, run_root
from pipeline.settings import trust
from pipeline.settings.config import Config, dump_config, load_config, parse_config
from pipeline.task.feed import Feed
from pipeline.tracking import tracking
from pipeline.tracking.tracking import Synced
from pipeline.train.world import choose_device, configure_process


def read(path: str | Path, overrides: list[str] | None, *, needs_data: bool = True, trust_code: bool = False) -> Config:
    """The config of a command as it was given: every name in it exists, and its settings fit together.

    Only a plan can do without the files of a source whose numbers are known. A config from a URL or a run's folder
    names no code unless `trust_code`, and no server for credentials of the user's. Warns of settings that do nothing.
    Raises UserError.
    """
    config = load_config(path, overrides)
    require_trusted(config, path, trust_code, trust.is_named("tracking.uri", overrides or []))
    require_fitting(config, f"config '{path}'", needs_data=needs_data)
    return config


def require_trusted(config: Config, path: str | Path, trust_code: bool, named_server: bool) -> None:
    """Raise UserError where a config from somebody else names code, or a server that would get the user's credentials.

    `named_server`: the user named the server.
    """
    if trust.is_foreign(path):
        trust.require_known_code(config.model, f"config '{path}'", trust_code)
        if config.tracking.enabled and not named_server:
            trust.require_named_server(
                config.tracking, f"config '{path}'", f"add tracking.uri={config.tracking.uri} to the command"
            )


def require_fitting(config: Config, origin: str, *, needs_data: bool = True) -> None:
    """Raise UserError where a name does not exist or settings do not fit together; warn of those that do nothing."""
    try:
        preflight.check_names(config, planned=not needs_data)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    for said in idle.idle(config):
        warnings.warn(said, stacklevel=3)


def load(path: str | Path, overrides: list[str] | None, *, needs_data: bool = True, trust_code: bool = False) -> Config:
    """As `read`, with local paths made absolute: workers may run in other folders."""
    return as_begun(absolute(read(path, overrides, needs_data=needs_data, trust_code=trust_code)))


def absolute(config: Config) -> Config:
    """The config with its local paths made absolute."""

    def whole(value: str | None) -> str | None:
        return value if value is None or "://" in value else os.path.abspath(os.path.expanduser(value))

    data = config.data.model_copy(
        update={"root": whole(config.data.root), "class_index": whole(config.data.class_index)}
    )
    model = config.model.model_copy(update={"checkpoint": whole(config.model.checkpoint)})
    start = config.start
    if start.source is not None and "/" in start.run:  # else it is a name under runs_dir
        start = start.model_copy(update={"source": whole(start.source)})
    target = config.target.model_copy(update={"latency_table": whole(config.target.latency_table)})
    parts = {"data": data, "model": model, "start": start, "target": target}
    return config.model_copy(update={"runs_dir": whole(config.runs_dir), **parts})


def run(config: Config, engine: Engine) -> Result:
    """Carry a run to its end, show its progress and its result."""
    configure_process(config.threads, config.reproducible)
    with Display() as display:
        try:
            result = stages.run(config, engine, display)
        finally:
            engine.close()
    here = Run(run_root(config), 0)
    classes = here.load(DataFacts, "data.json").classes
    show_result(result, here.path("report.html"), config.target.margin, classes)
    return result


def plan(
    path: str,
    overrides: list[str],
    compressions: str | None = None,
    figure: str | None = None,
    device: bool = False,
    trust_code: bool = False,
    full: bool = False,
    as_json: bool = False,
) -> None:
    """Print what a run of a config would do: a summary, with `full` every list too.

    With `device` also the largest batch that fits into this GPU. With `compressions` instead what
    `prune.allocation=budget` would keep; `figure` is a file (.svg or .png) that their curve is drawn into.
    """
    config = load(path, overrides, needs_data=False, trust_code=trust_code)
    if compressions is not None:
        show_options(config, compressions, figure, as_json)
    elif figure is not None:
        raise UserError(f"--figure {figure} draws the curve of several budgets: give --budgets 2,4,8 too")
    else:
        show(config, full, as_json)
    if device:
        for fit in capacity.find(config, preflight.count_samples(config.data, config.seed).classes):
            make_console(stderr=as_json).print(fit.sentence, markup=False)


def show(config: Config, full: bool, as_json: bool) -> None:
    """Print a plan."""
    made = outlook.make(config)
    needed, outline = planning.needs(config, made)
    if as_json:
        print(planning.as_json(made, needed))
        return
    console = make_console()
    for line in planning.summary(config, made, needed, outline):
        console.print(line, markup=False)
    if full:
        show_plan(made, dump_config(config), console)
    for note in made.notes:
        console.print(f"note: {note}", markup=False)
    if not full:
        console.print("every tensor, every round and every setting: the same command with --full", markup=False)


def show_options(config: Config, compressions: str, figure: str | None, as_json: bool) -> None:
    """Print several budgets solved from the run's scan, and draw their curve into a file. Raises UserError."""
    figures.require_name(figure, "--figure")
    options = budgets.solve(config, budgets.parse(compressions))
    if as_json:
        solved = {
            kind: [{**plain(each), "rise": each.solution.rise} for each in found]
            for kind, found in (("asked", options.asked), ("curve", options.curve))
        }
        print(json.dumps({**plain(options), **solved}, indent=1))
    else:
        show_tables([budgets.table(options)], budgets.bars(options))
    if figure is not None:
        label = "Predicted rise of the loss against compression"
        figures.write(plots.budgets(options), figure, label, "--figure")


def bench(run_dir: str | Path, repeats: int, batches: Sequence[int], trust_code: bool = False) -> Bench:
    """Export and measure a finished run's networks on this machine, and tell its result and report."""
    if repeats < LEAST:
        raise UserError(f"repeats={repeats}: give at least {LEAST}")
    config = config_of(run_dir)
    require_known_code(config, run_dir, trust_code)
    configure_process(config.threads, config.reproducible)
    with open_run(config) as here:
        found = bench_run(here.root, repeats, batches=batches, trust_code=trust_code, check=here.check_fence)
        final.update(here, latency_ms=found.summary)
    return found


def bench_table(path: str, overrides: list[str], out: str, *, trust_code: bool = False) -> str:
    """Measure a table of latencies on this machine and write it into `out`; what it tells.

    `path` is a config, or a run's folder.
    """
    if storage.exists(storage.join(path, "config.yaml")):
        path = storage.join(path, "config.yaml")
    config = load(path, overrides, needs_data=False, trust_code=trust_code)
    config = config.model_copy(update={"target": config.target.model_copy(update={"latency_table": None})})
    configure_process(config.threads, config.reproducible)
    counts = preflight.count_samples(config.data, config.seed)
    device = choose_device(config.device)
    model = Feed.of(config).place(build_network(config.model, counts.classes, config.seed), device)
    made, groups = timing.of_model(model, config, device)
    try:
        storage.write_json(out, made.to_json())
    except OSError as error:
        raise UserError(f"--table {out}: cannot be written: {error.strerror}") from error
    return f"{out}: {timing.told(made, groups)}"


def sync(run_dir: str | Path, uri: str | None = None) -> Synced:
    """Make the run's server, or another at `uri`, hold the run; twice is the same as once.

    A finished run that could not learn its place in MLflow is told it now, as it would have been at its end. Raises
    UserError where credentials would go to a server that only the run's folder names.
    """
    config = config_of(run_dir)
    if uri is None:
        trust.require_named_server(config.tracking, f"run '{run_dir}'", f"add --uri {config.tracking.uri}")
    else:
        values = config.model_dump(mode="json")
        config = parse_config({**values, "tracking": {**values["tracking"], "uri": uri}}, origin="--uri")
    synced = tracking.sync(run_dir, config)
    here = Run(str(run_dir), 0)
    if here.has("result.json") and here.load(Result, "result.json").mlflow is None:
        with lease.hold(str(run_dir), config.cluster.lease_seconds, lambda: None, warnings.warn) as held:
            final.update(Run(str(run_dir), held.fence, held.token, held.alive), mlflow=synced.place)
        synced = tracking.sync(run_dir, config)
    if synced.lacks:
        warnings.warn(f"{synced.lacks}. The rest of the run is there", stacklevel=2)
    return synced


def report(run_dir: str) -> str:
    """Write report.html of a finished run again; where it is."""
    config_of(run_dir)
    if not storage.exists(storage.join(run_dir, "result.json")):
        raise UserError(f"run '{run_dir}' has no result.json yet: run the command that started it again to finish it")
    return reports.write(run_dir)


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
