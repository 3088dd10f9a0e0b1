"""What the command lines do, with Ray (`secateur`, `python -m cluster`) or without (`python -m pipeline`)."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline import config as settings
from pipeline import lease, plan, stages
from pipeline.config import Config
from pipeline.console import Display, show_plan, show_result
from pipeline.data import storage
from pipeline.distributed import configure_process
from pipeline.engine import Engine
from pipeline.errors import UserError
from pipeline.results import final, mirror, tracking
from pipeline.results.tracking import Synced
from pipeline.state import Run, run_root


def load(path: str | Path, overrides: list[str] | None, *, needs_data: bool = True) -> Config:
    """The config of a command, with local paths made absolute: workers may run in other folders.

    Only a plan can do without ImageNet's files, whose numbers are known. Raises UserError.
    """
    config = settings.load(path, overrides)
    if needs_data and config.data.source == "imagenet" and config.data.root is None:
        raise UserError(f"config '{path}': data: {settings.NO_ROOT.format('imagenet')}")

    def absolute(value: str | None) -> str | None:
        return value if value is None or "://" in value else os.path.abspath(os.path.expanduser(value))

    data = config.data.model_copy(
        update={"root": absolute(config.data.root), "class_index": absolute(config.data.class_index)}
    )
    model = config.model.model_copy(update={"checkpoint": absolute(config.model.checkpoint)})
    start = config.start
    if start.source is not None and "/" in start.run:  # else it is a name under runs_dir
        start = start.model_copy(update={"source": absolute(start.source)})
    parts = {"data": data, "model": model, "start": start}
    return config.model_copy(update={"runs_dir": absolute(config.runs_dir), **parts})


def leave(command_line: Callable[[], None]) -> NoReturn:
    """Run a command line and end the process with its exit code.

    A thread that still waits for MLflow would abort the interpreter's own end (it is within C++ then), so the process
    leaves without it.
    """
    code: Any = 0
    try:
        command_line()
    except SystemExit as error:
        code = error.code or 0
    if any(thread.name == mirror.THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    raise SystemExit(code)


def run(config: Config, engine: Engine) -> dict[str, Any]:
    """Carry a run to its end, show its progress and its result."""
    configure_process(config)
    with Display() as display:
        try:
            result = stages.run(config, engine, display)
        finally:
            engine.close()
    show_result(result, storage.join(run_root(config), "report.html"))
    return result


def show(config: Config) -> None:
    """Print what a run would do."""
    made = plan.make(config)
    plan.require_plan_possible(made)
    show_plan(made, config)


def sync(run_dir: str | Path, uri: str | None = None) -> Synced:
    """Make the run's server, or another at `uri`, hold the run; twice is the same as once.

    A finished run that could not learn its place in MLflow is told it now, as it would have been at its end.
    """
    config = config_of(run_dir)
    if uri is not None:
        values = config.model_dump(mode="json")
        config = settings.parse({**values, "tracking": {**values["tracking"], "uri": uri}}, origin="--uri")
    synced = tracking.sync(run_dir, config)
    result = storage.join(run_dir, "result.json")
    if storage.exists(result) and storage.read_json(result)["mlflow"] is None:
        with lease.hold(str(run_dir), config.cluster.lease_seconds, lambda: None, warnings.warn) as fence:
            final.update(Run(str(run_dir), fence), mlflow=synced.place)
        synced = tracking.sync(run_dir, config)
    return synced


def config_of(run_dir: str | Path) -> Config:
    """The config of an existing run, its runs_dir being where the run lies now."""
    file = storage.join(run_dir, "config.yaml")
    if not storage.exists(file):
        raise UserError(f"'{run_dir}' is not a run: it has no config.yaml; give a folder such as runs/demo")
    place = str(storage.local_path(run_dir).resolve()) if storage.is_local(run_dir) else str(run_dir).rstrip("/")
    runs_dir, _, name = place.rpartition("/")
    return settings.load(file).model_copy(update={"runs_dir": runs_dir, "name": name})
