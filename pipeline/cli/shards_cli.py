"""secateur shards: make, take over, check and upload WebDataset shards. Loads nothing heavy."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.arguments import ConfigPath, Overrides, Workers

shards_app = typer.Typer(help="Make, take over and check WebDataset shards.", no_args_is_help=True)


@shards_app.command("build")
def build(
    config: ConfigPath,
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    overrides: Overrides = None,
    workers: Workers = None,
) -> None:
    """Write WebDataset shards and manifest.json from the config's data source."""
    from pipeline.cli import shards

    shards.build(config, overrides or [], out, workers)


@shards_app.command("index")
def index(
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
    from pipeline.cli import shards

    shards.index(root, label, classes, val_fraction, seed, skip_bad, workers)


@shards_app.command("verify")
def verify(root: Annotated[str, typer.Argument(help="Folder with manifest.json.")], workers: Workers = None) -> None:
    """Check shards against their manifest, down to every image."""
    from pipeline.cli import shards

    shards.verify(root, workers)


@shards_app.command("push")
def push(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder with manifest.json.")],
    target: Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="Where the shards go.")],
) -> None:
    """Upload shards, those that are there already left out, and then their manifest."""
    from pipeline.cli import shards

    shards.push(source, target)
