"""secateur: prune neural networks on a cluster. One run goes from data to report; run it again to go on."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import messages, shared
from pipeline.cli.arguments import Address, AsJson, ConfigPath, OneConfig, Overrides, TrustCode
from pipeline.paper.arguments import ALL_NETWORKS, CONFIGS, Configs, DataRoot, Networks, RunsDir, Seeds, Target

app = shared.program(__doc__, completion=True)

# Each command imports what it needs when it runs: help is printed at once.


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, trust_code: TrustCode = False) -> None:
    """Train, scan, prune and retrain in rounds, report; goes on where it was stopped."""
    from cluster import actions

    actions.run(config, overrides or [], trust_code)


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Prune a network on scikit-learn's digits, through every stage, into runs/demo; takes about two minutes."""
    config = shared.demo_config()
    run(config, overrides)
    print(f"config: {config}    MLflow: secateur ui")


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
def logs(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Folder or URL of a run, or the name of a Ray job.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines come.")] = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Print the log of a run, of all its processes in the order of time; or what a Ray job printed."""
    if run_dir.startswith("raysubmit_"):
        from cluster import submit

        raise SystemExit(submit.print_log(run_dir, address, follow))
    shared.logs(run_dir, follow, as_json)


@app.command()
def doctor(config: OneConfig = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check this machine, or what a config names: each problem with its remedy; exit code 1 where there is one."""
    from cluster import checks

    shared.examine(config, overrides, checks.ALL, as_json)


shared.add_rest(app)


def command_line() -> None:
    """Run the command line. Exit codes: 0 done, 2 a mistake that the user can mend, 75 what may pass, 130 Ctrl-C and
    SIGTERM.
    """
    with messages.one_message(resume=messages.typed("secateur")):
        app()


def main() -> None:
    """The program `secateur`."""
    messages.leave(command_line)
