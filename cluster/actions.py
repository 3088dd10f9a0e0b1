"""What the commands of `secateur` do that need Ray."""

from __future__ import annotations

from cluster import connect
from cluster.engine import RayEngine
from pipeline import stages
from pipeline.cli import commands
from pipeline.cli.console import show_scan
from pipeline.cli.display import Display
from pipeline.paper import reproduce as paper
from pipeline.run import state
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


def _checked(config: str, overrides: list[str]) -> list[str]:
    """Refuse relative paths in a job, whose working directory is gone when it ends."""
    if connect.in_job():
        connect.require_shared_paths(
            load_config(config, overrides),
            "a job's working directory is temporary and the next submission does not see it",
        )
    return overrides
