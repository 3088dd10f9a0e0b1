"""The method without Ray: `python -m pipeline run CONFIG`, or under `torchrun -m pipeline run CONFIG`."""

from __future__ import annotations

from pipeline.cli import messages, shared
from pipeline.cli.arguments import AsJson, ConfigPath, OneConfig, Overrides, TrustCode
from pipeline.paper.arguments import ALL_NETWORKS, CONFIGS, Configs, DataRoot, Networks, RunsDir, Seeds, Target

PROGRAM = "python -m pipeline"

app = shared.program(__doc__, completion=False)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Train, scan, prune and retrain, report; goes on where it was stopped."""
    from pipeline.cli import commands
    from pipeline.local import LocalEngine
    from pipeline.train.world import configure_process, torchrun_world

    loaded = commands.load(config, overrides, trust_code=trust_code)
    configure_process(loaded.threads, loaded.reproducible)
    with torchrun_world(loaded.device, loaded.cluster.hang_seconds) as world:
        engine = LocalEngine(world)
        if world.first:
            commands.run(loaded, engine)
        else:
            engine.follow()


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Prune a network on scikit-learn's digits, through every stage, into runs/demo; takes about two minutes."""
    run(shared.demo_config(), overrides)


@app.command()
def doctor(config: OneConfig = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check this machine, or what a config names: each problem with its remedy; exit code 1 where there is one."""
    shared.examine(config, overrides, (), as_json)


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
    from pipeline.local import LocalEngine
    from pipeline.paper import reproduce as paper
    from pipeline.train.world import configure_process, torchrun_world

    jobs = paper.jobs(paper.Wanted(target, data, seeds, runs_dir, networks, configs), overrides or [])
    first = next(iter(jobs[0].runs.values()))
    configure_process(first.threads, first.reproducible)
    with torchrun_world(first.device, first.cluster.hang_seconds) as world:
        engine = LocalEngine(world)
        if world.first:
            paper.carry_out(jobs, engine, messages.typed(PROGRAM))
        else:
            engine.follow()


app.command()(shared.logs)
shared.add_rest(app)


def command_line() -> None:
    """Run the command line."""
    with messages.one_message(resume=messages.typed(PROGRAM)):
        app()


if __name__ == "__main__":
    messages.leave(command_line)
