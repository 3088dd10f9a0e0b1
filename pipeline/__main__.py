"""The method without Ray: `python -m pipeline run CONFIG`, or under `torchrun -m pipeline run CONFIG`."""

from __future__ import annotations

import sys

import typer

from pipeline.cli import commands
from pipeline.cli.commands import ConfigPath, Overrides, TrustCode
from pipeline.cli.console import main_module, one_message
from pipeline.local import LocalEngine
from pipeline.paper import reproduce as paper
from pipeline.train.world import configure_process, torchrun_world

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Train, scan, prune and retrain, report; goes on where it was stopped."""
    loaded = commands.load(config, overrides, trust_code=trust_code)
    configure_process(loaded.threads)
    with torchrun_world(loaded.device, loaded.cluster.hang_seconds) as world:
        engine = LocalEngine(world)
        if world.first:
            commands.run(loaded, engine)
        else:
            engine.follow()


app.command("plan")(commands.plan_command)


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
    jobs = paper.jobs(paper.Wanted(target, data, seeds, runs_dir, networks, configs), overrides or [])
    first = next(iter(jobs[0].runs.values()))
    configure_process(first.threads)
    with torchrun_world(first.device, first.cluster.hang_seconds) as world:
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
