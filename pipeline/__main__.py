"""The method without Ray: `python -m pipeline run CONFIG`, or under `torchrun -m pipeline run CONFIG`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipeline import commands
from pipeline import reproduce as paper
from pipeline.console import main_module, one_message
from pipeline.distributed import configure_process, torchrun_world
from pipeline.local import LocalEngine

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/, or its URL.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's.")]


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, scan, prune and retrain, report; goes on where it was stopped."""
    loaded = commands.load(config, overrides)
    configure_process(loaded)
    with torchrun_world(loaded) as world:
        engine = LocalEngine(world)
        if world.first:
            commands.run(loaded, engine)
        else:
            engine.follow()


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    budgets: commands.Budgets = None,
    figure: commands.FigureFile = None,
) -> None:
    """Show what a run would do, and run nothing."""
    commands.show(commands.load(config, overrides, needs_data=False), budgets, figure)


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
    jobs = paper.jobs(target, overrides or [], data, seeds, runs_dir, networks, configs)
    first = next(iter(jobs[0].runs.values()))
    configure_process(first)
    with torchrun_world(first) as world:
        engine = LocalEngine(world)
        if world.first:
            paper.carry_out(jobs, engine, main_module(["python -m pipeline", *sys.argv[1:]]))
        else:
            engine.follow()


def command_line() -> None:
    """Run the command line."""
    with one_message(resume=main_module(["python -m pipeline", *sys.argv[1:]])):
        app()


if __name__ == "__main__":
    commands.leave(command_line)
