"""Arguments and options of the commands, with their help. Loads nothing heavy."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/, or its URL.")]
OneConfig = Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Also check what this config names.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's.")]
Budgets = Annotated[
    str | None,
    typer.Option(metavar="2,4,8", help="Show what would be kept at these compressions, by the run's scan."),
]
FigureFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Draw these compressions, or these runs, as a curve: .svg or .png.")
]
OnDevice = Annotated[
    bool, typer.Option("--device", help="Also try out the largest batch that this machine's GPU has memory for.")
]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Run the code of a network that a URL's or a run's config names by import path."),
]
RunPath = Annotated[
    str, typer.Argument(metavar="RUN", help="Folder of a run, as in runs/demo or s3://bucket/runs/demo.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each core.")]
Address = Annotated[str | None, typer.Option(help="Ray dashboard, as in http://127.0.0.1:8265.")]
