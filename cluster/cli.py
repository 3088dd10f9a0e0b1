"""secateur: prune neural networks on a cluster. One run goes from data to report; run it again to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.packed_cli import packed_app
from pipeline.cli import messages
from pipeline.cli.arguments import Address, ConfigPath, Overrides, RunPath, TrustCode, Workers, plan
from pipeline.paper.arguments import ALL_NETWORKS, CONFIGS, Configs, DataRoot, Networks, RunsDir, Seeds, Target

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
shards_app = typer.Typer(help="Make, take over and check WebDataset shards.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(packed_app, name="packed")

# Each command imports what it needs when it runs: help is printed at once.


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Train, scan, prune and retrain in rounds, report; goes on where it was stopped."""
    from cluster import actions

    actions.run(config, overrides or [], trust_code)


app.command()(plan)


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
    from cluster import actions

    actions.scan(config, overrides or [], after, merge or [], trust_code)


@app.command()
def reproduce(
    target: Target,
    overrides: Overrides = None,
    data: DataRoot = None,
    seeds: Seeds = "0,1,2",
    runs_dir: RunsDir = None,
    networks: Networks = ALL_NETWORKS,
    configs: Configs = CONFIGS,
) -> None:
    """The paper's tables 1-3 and figures 4-7 beside ours; goes on where it was stopped."""
    from cluster import actions
    from pipeline.paper.reproduce import Wanted

    actions.reproduce(
        Wanted(target, data, seeds, runs_dir, networks, configs), overrides or [], messages.typed("secateur")
    )


@app.command()
def report(run_dir: RunPath) -> None:
    """Write report.html of a finished run again."""
    from cluster import actions

    print(actions.report(run_dir))


@app.command()
def bench(
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a finished run; with --table, a run or a config.")
    ],
    overrides: Overrides = None,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Only measure how long the network takes at some widths: target.latency_table.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed passes of each network.", min=5)] = 100,
    batches: Annotated[
        str, typer.Option(metavar="1,64", help="Samples in a pass; the first is the report's.")
    ] = "1,64",
    trust_code: TrustCode = False,
) -> None:
    """Measure dense, pruned, compact and CSR networks of a finished run on this machine, and export ONNX."""
    from cluster import actions

    if table is not None:
        actions.bench_table(run_dir, overrides or [], table, trust_code)
    else:
        actions.bench(run_dir, overrides or [], repeats, batches, trust_code)


@app.command()
def sync(
    run_dir: RunPath,
    uri: Annotated[
        str | None,
        typer.Option(help="Tracking server; the run's by default, where no credentials would be sent to it."),
    ] = None,
) -> None:
    """Bring MLflow up to date from the run's folder; twice is the same as once."""
    from pipeline.cli import commands

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
    from cluster import submit

    raise SystemExit(submit.submit(config, overrides or [], address, wait, runtime_env, trust_code))


@app.command()
def ui(
    runs_dir: Annotated[Path, typer.Argument(help="Folder that holds runs and mlflow.db.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Browse runs in the MLflow UI."""
    from cluster import actions

    actions.ui(runs_dir, port)


@shards_app.command("build")
def shards_build(
    config: ConfigPath,
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    overrides: Overrides = None,
    workers: Workers = None,
) -> None:
    """Write WebDataset shards and manifest.json from the config's data source."""
    from cluster import actions

    actions.build_shards(config, overrides or [], out, workers)


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
    workers: Workers = None,
) -> None:
    """Make a manifest.json for shards that another program wrote."""
    from cluster import actions

    actions.index_shards(root, label, classes, val_fraction, seed, skip_bad, workers)


@shards_app.command("verify")
def shards_verify(
    root: Annotated[str, typer.Argument(help="Folder with manifest.json.")], workers: Workers = None
) -> None:
    """Check shards against their manifest, down to every image."""
    from cluster import actions

    actions.verify_shards(root, workers)


@shards_app.command("push")
def shards_push(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder with manifest.json.")],
    target: Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="Where the shards go.")],
) -> None:
    """Upload shards, those that are there already left out, and then their manifest."""
    from cluster import actions

    actions.push_shards(source, target)


def command_line() -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake that the user can mend, 75 what may pass, 130 Ctrl-C and
    SIGTERM.
    """
    with messages.one_message(resume=messages.typed("secateur")):
        app()


def main() -> None:
    """The program `secateur`."""
    messages.leave(command_line)
