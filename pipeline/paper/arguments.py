"""Arguments and options of `reproduce`, with their help. Loads nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.paper import printed

ALL_NETWORKS = ",".join(printed.NETWORKS)
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "paper"
Target = Annotated[str, typer.Argument(metavar="TARGET", help="lenet-300-100, lenet-5, figure5 or all.")]
DataRoot = Annotated[str | None, typer.Option("--data", help="Folder of MNIST's idx files; sets data.root.")]
Seeds = Annotated[str, typer.Option(help="Seeds of the networks' runs; figure5 takes the first.")]
RunsDir = Annotated[str | None, typer.Option(help="Folder that holds runs; sets runs_dir.")]
Networks = Annotated[str, typer.Option(help="The networks of figure5.")]
Configs = Annotated[Path, typer.Option(help="Folder with NETWORK.yaml and figure5-NETWORK.yaml.")]
