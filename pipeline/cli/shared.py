"""The commands that need no Ray: `secateur` and `python -m pipeline` both have them. Loads nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.arguments import (
    AsJson,
    Budgets,
    ConfigPath,
    FigureFile,
    OnDevice,
    Overrides,
    RunPath,
    TrustCode,
)
from pipeline.cli.packed_cli import packed_app
from pipeline.cli.shards_cli import shards_app


def program(help: str, completion: bool) -> typer.Typer:
    """A command line with --version, -h and the commands by which one begins; `add_rest` adds the others.

    With `completion` it can install its own for a shell.

    Help is plain text: rich's would take longer to load than everything else.
    """
    app = typer.Typer(
        help=help,
        no_args_is_help=True,
        add_completion=completion,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    for command in (init, plan):
        app.command()(command)
    return app


def demo_config() -> str:
    """The demo's config: in a checkout among the others, in an installed package beside `import secateur`."""
    root = Path(__file__).parents[2]
    installed = root / "secateur" / "demo.yaml"
    return str(installed if installed.is_file() else root / "configs" / "demo.yaml")


def add_rest(app: typer.Typer) -> None:
    """Add the commands that look at runs, and those for shards and released files."""
    app.command("list")(list_command)
    for command in (status, watch, compare, report, bench, sync, ui):
        app.command()(command)
    app.add_typer(shards_app, name="shards")
    app.add_typer(packed_app, name="packed")


def _say_version(wanted: bool) -> None:
    if wanted:
        from pipeline.base.version import VERSION

        print(f"secateur {VERSION}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command; its help is the program's."""


def init(
    data: Annotated[
        str | None,
        typer.Option(help="Folder or tar with train/CLASS/*, or of shards; digits takes the demo's.", metavar="PATH"),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(help="As in resnet18 (of torchvision.models), lenet_5, my_module:build.", metavar="NAME"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="How many times fewer weights, as in 8, or no-loss.", metavar="8|no-loss")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Trained weights to start from; else the network is trained.", metavar="FILE")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the network's input; by default what the images suggest.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(help="Config to write; the run has its name.", metavar="FILE")] = Path(
        "my-network.yaml"
    ),
) -> None:
    """Write a config of your own, with comments; asks for what is not given."""
    from pipeline.cli import init as making

    making.write(making.Answers(data, network, target, checkpoint, size), out)


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    budgets: Budgets = None,
    figure: FigureFile = None,
    device: OnDevice = False,
    full: Annotated[bool, typer.Option("--full", help="Also every setting, tensor and round.")] = False,
    as_json: AsJson = False,
    trust_code: TrustCode = False,
) -> None:
    """Show what a run would do, its time, memory and disk; trains nothing."""
    from pipeline.cli import commands

    commands.plan(config, overrides or [], budgets, figure, device, trust_code, full, as_json)


def list_command(
    runs_dir: Annotated[str, typer.Argument(metavar="RUNS_DIR", help="Folder that holds runs, or its URL.")] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs of a folder: network, stage, compression, verdict, when."""
    from pipeline.cli import runs

    runs.show(runs_dir, as_json)


def status(run_dir: RunPath, as_json: AsJson = False) -> None:
    """Say where a run stands, what is left, and whether a process is at it."""
    from pipeline.cli import status as standing

    standing.show(run_dir, as_json)


def watch(run_dir: RunPath) -> None:
    """Follow a run to its end, from its folder; Ctrl-C ends only the watching."""
    from pipeline.cli import watch as watching

    raise SystemExit(watching.watch(run_dir))


def logs(
    run_dir: RunPath,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the log of a run, of all its processes, in the order of time."""
    from pipeline.cli import watch as watching

    watching.print_log(run_dir, follow, as_json)


def compare(
    run_dirs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders or URLs of finished runs.")],
    figure: FigureFile = None,
    as_json: AsJson = False,
) -> None:
    """Put finished runs side by side: size, error, drop, verdict; --figure draws the error against the compression."""
    from pipeline.cli import compare as comparing

    comparing.show(run_dirs, figure, as_json)


def report(run_dir: RunPath) -> None:
    """Write report.html of a finished run again."""
    from pipeline.cli import commands

    print(commands.report(run_dir))


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
    repeats: Annotated[int | None, typer.Option(help="Timed passes of each network; by default 100.", min=5)] = None,
    batches: Annotated[
        str | None,
        typer.Option(metavar="1,64", help="Samples in a pass; the first is the report's; by default 1,64."),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Measure dense, pruned, compact and CSR networks of a finished run on this machine, and export them."""
    from pipeline.base.errors import UserError
    from pipeline.cli import commands
    from pipeline.cli.console import show_bench
    from pipeline.export.bench import BATCHES, parse_batches

    sizes = parse_batches(batches) if batches is not None else BATCHES
    if table is not None:
        if batches is not None:
            raise UserError(
                f"--batches {batches}: a table is of one number of samples in a pass, which is a setting: give "
                f"target.latency_batch={sizes[0]} instead"
            )
        if repeats is not None:
            raise UserError(f"--repeats {repeats}: with --table the number of passes is fixed: leave it out")
        print(commands.bench_table(run_dir, overrides or [], table, trust_code=trust_code))
        return
    if overrides:
        raise UserError(f"{overrides[0]}: settings are given with --table only; a run is measured as it is")
    show_bench(commands.bench(run_dir, 100 if repeats is None else repeats, sizes, trust_code))


def sync(
    run_dir: RunPath,
    uri: Annotated[
        str | None,
        typer.Option(
            help="Tracking server; by default the run's own. Needed where the run's server would get your credentials."
        ),
    ] = None,
) -> None:
    """Bring MLflow up to date from the run's folder; twice is the same as once."""
    from pipeline.cli import commands

    synced = commands.sync(run_dir, uri)
    print(f"MLflow at {synced.tracking_uri}: experiment {synced.experiment_id}, run {synced.run_id}")


def ui(
    runs_dir: Annotated[Path, typer.Argument(help="Folder that holds runs and mlflow.db.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Browse runs in the MLflow UI."""
    from pipeline.cli import commands

    commands.ui(runs_dir, port)


def examine(config: str | None, overrides: list[str] | None, more: Any, as_json: bool) -> None:
    """Print what `doctor` finds, and end with its exit code; `more` are checks of the program's own."""
    from pipeline.cli import doctor

    raise SystemExit(doctor.show(config, overrides or [], more, as_json))
