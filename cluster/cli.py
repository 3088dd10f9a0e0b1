"""secateur: prune neural networks on a cluster. One run goes from data to report; run it again to go on."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import connect, submit
from cluster.engine import RayEngine
from cluster.packed_cli import packed_app
from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.cli import commands
from pipeline.cli.commands import ConfigPath, Overrides, TrustCode
from pipeline.cli.console import Display, main_module, one_message, show_bench, show_scan
from pipeline.data import push, shards
from pipeline.export.bench import bench_run
from pipeline.paper import reproduce as paper
from pipeline.results import final
from pipeline.results import report as reports
from pipeline.run import state
from pipeline.run.events import ShardsCounted
from pipeline.run.state import config_of
from pipeline.settings import trust
from pipeline.train.world import configure_process

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
shards_app = typer.Typer(help="Make, take over and check WebDataset shards.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(packed_app, name="packed")

RunPath = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a run, as in runs/demo or s3://bucket/runs/demo.")
]
Address = Annotated[str | None, typer.Option(help="Ray dashboard, as in http://127.0.0.1:8265.")]


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Train, scan, prune and retrain in rounds, report; goes on where it was stopped."""
    commands.run(commands.load(config, _checked(config, overrides), trust_code=trust_code), RayEngine())


app.command("plan")(commands.plan_command)


@app.command()
def scan(
    config: ConfigPath,
    overrides: Overrides = None,
    after: Annotated[int | None, typer.Option(help="Scan the model of this finished round.", metavar="ROUND")] = None,
    merge: Annotated[
        list[str] | None, typer.Option(help="Take the levels of these scan.json, of other machines.", metavar="FILE...")
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Only the sensitivity scan, with what it needs before it (shards, dense network)."""
    given = overrides or []
    files = [*merge, *(part for part in given if "=" not in part)] if merge else []
    given = [part for part in given if part not in files]
    loaded = commands.load(config, _checked(config, given), trust_code=trust_code)
    engine = RayEngine()
    with Display() as display, state.open_run(loaded) as here:
        try:
            found = stages.scan(loaded, engine, here, display, files, after)
        finally:
            engine.close()
    show_scan(found)


@app.command()
def reproduce(
    target: paper.Target,
    overrides: Overrides = None,
    data: paper.DataRoot = None,
    seeds: paper.Seeds = "0,1,2",
    runs_dir: paper.RunsDir = None,
    networks: paper.Networks = paper.ALL_NETWORKS,
    configs: paper.Configs = paper.CONFIGS,
) -> None:
    """The paper's tables 1-3 and figures 4-7 beside ours; goes on where it was stopped."""
    jobs = paper.jobs(paper.Wanted(target, data, seeds, runs_dir, networks, configs), overrides or [], _checked)
    paper.carry_out(jobs, RayEngine(), _typed())


@app.command()
def report(run_dir: RunPath) -> None:
    """Write report.html of a finished run again."""
    config_of(run_dir)
    if not storage.exists(storage.join(run_dir, "result.json")):
        raise UserError(f"run '{run_dir}' has no result.json yet: run the command that started it again to finish it")
    print(reports.write(run_dir))


@app.command()
def bench(
    run_dir: RunPath,
    repeats: Annotated[int, typer.Option(help="Timed passes of each network.", min=5)] = 100,
    trust_code: TrustCode = False,
) -> None:
    """Measure dense, pruned, compact and CSR networks of a finished run on this machine, and export ONNX."""
    config = config_of(run_dir)
    trust.require_known_code(config.model, f"run '{run_dir}'", trust_code)
    configure_process(config.threads)
    with state.open_run(config) as here:
        found = bench_run(here.root, repeats, trust_code=trust_code, check=here.check_fence)
        final.update(here, latency_ms=found.summary)
    show_bench(found)


@app.command()
def sync(
    run_dir: RunPath,
    uri: Annotated[
        str | None,
        typer.Option(help="Tracking server; the run's by default, where no credentials would be sent to it."),
    ] = None,
) -> None:
    """Bring MLflow up to date from the run's folder; twice is the same as once."""
    synced = commands.sync(run_dir, uri)
    print(f"MLflow at {synced.tracking_uri}: experiment {synced.experiment_id}, run {synced.run_id}")


@app.command("submit")
def submit_command(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option(help="Follow the log and end with the job's exit code.")] = True,
    runtime_env: Annotated[
        str | None, typer.Option(help="YAML with more of Ray's runtime_env: env_vars, pip.", metavar="FILE")
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Run it as a Ray job; submitting it again resumes, or follows the job that is at it."""
    raise SystemExit(submit.submit(config, overrides or [], address, wait, runtime_env, trust_code))


@app.command()
def ui(
    runs_dir: Annotated[Path, typer.Argument(help="Folder that holds runs and mlflow.db.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Browse runs in the MLflow UI."""
    database = runs_dir.resolve() / "mlflow.db"
    if not database.is_file():
        raise UserError(
            f"'{database}' does not exist: no run has been tracked there yet; give the runs_dir of your runs"
        )
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        f"sqlite:///{database}",
        "--port",
        str(port),
    ]
    print(f"http://127.0.0.1:{port}", flush=True)
    os.execv(command[0], command)  # Ctrl-C and SIGTERM then reach the server itself


@shards_app.command("build")
def shards_build(
    config: ConfigPath, out: Annotated[str, typer.Argument(help="Folder for the shards.")], overrides: Overrides = None
) -> None:
    """Write WebDataset shards and manifest.json from the config's data source."""
    loaded = commands.load(config, overrides, trust_code=True)  # no network is built here
    with Display() as display:
        made = shards.build(loaded.data, loaded.seed, out, _counting(display))
    _describe(made)


@shards_app.command("index")
def shards_index(
    root: Annotated[str, typer.Argument(help="Folder with train*.tar, val*.tar, test*.tar.")],
    label: Annotated[str, typer.Option(help="cls, or the name of a field of json.")] = "cls",
    classes: Annotated[int | None, typer.Option(help="Number of classes; by default the largest label + 1.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Held out of train where there is no val.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Draws val.")] = 0,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave out samples without label or image, or whose image cannot be decoded."),
    ] = False,
) -> None:
    """Make a manifest.json for shards that another program wrote."""
    with Display() as display:
        made, notes = shards.index(
            root,
            label=label,
            val_fraction=val_fraction,
            seed=seed,
            num_classes=classes,
            progress=_counting(display),
            skip_bad=skip_bad,
        )
    for note in notes:
        print(f"warning: {note}")
    _describe(made)


@shards_app.command("verify")
def shards_verify(root: Annotated[str, typer.Argument(help="Folder with manifest.json.")]) -> None:
    """Check shards against their manifest, down to every image."""
    with Display() as display:
        problems = shards.verify(root, _counting(display))
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} problems in '{root}': replace the shards named above, or index again")
    print("all shards are as their manifest says")


@shards_app.command("push")
def shards_push(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder with manifest.json.")],
    target: Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="Where the shards go.")],
) -> None:
    """Upload shards, those that are there already left out, and then their manifest."""
    with Display() as display:
        sent, there = push.push(source, target, _counting(display))
    print(f"{sent} shards uploaded, {there} were there: data.source=shards data.root={target}")


def _counting(display: Display) -> shards.Progress:
    return lambda text, done, total: display(ShardsCounted(text, done, total))


def _describe(manifest: shards.Manifest) -> None:
    parts = ", ".join(
        f"{split}: {sum(shard.used for shard in parts):,} samples in {len(parts)} shards"
        for split, parts in manifest.splits.items()
    )
    held = f"; val: {len(manifest.holdout):,} samples held out of train" if manifest.holdout is not None else ""
    print(f"{parts}{held}; {manifest.num_classes} classes")


def _checked(config: str, overrides: list[str] | None) -> list[str]:
    """Refuse relative paths in a job, whose working directory is gone when it ends."""
    if connect.in_job():
        from pipeline.settings.config import load_config

        connect.require_shared_paths(
            load_config(config, overrides),
            "a job's working directory is temporary and the next submission does not see it",
        )
    return overrides or []


def _typed() -> str:
    """The command as it was typed."""
    return main_module(["secateur", *(shlex.quote(part) for part in sys.argv[1:])])


def command_line() -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake that the user can mend, 75 what may pass, 130 Ctrl-C and
    SIGTERM.
    """
    with one_message(resume=_typed()):
        app()


def main() -> None:
    """The program `secateur`."""
    commands.leave(command_line)
