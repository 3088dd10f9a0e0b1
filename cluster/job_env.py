"""What a job takes along: the working directory without data and runs, and a checked runtime_env of Ray."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import yaml

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import hint
from pipeline.settings.config import Config

# What a job does not need from the working directory: runs, and what tools leave behind.
EXCLUDES = [
    "runs", ".env", ".venv", ".git", "*.tar", "*.db", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache",
]  # fmt: skip
# How long a cancelled job may take to give its lease back and bring MLflow up to date; Ray's 3 s end in a SIGKILL.
STOP_SECONDS = 90
_MIB = 2**20


def make(config: Config, extra: str | None, folder: Path) -> dict[str, Any]:
    """The runtime_env of a job whose working directory is a copy of `folder`; `extra` is a YAML file with more of it.

    Raises UserError for a key that Ray does not know (Ray itself would ignore it) or a folder too large to send.
    """
    given = _read(extra) if extra is not None else {}
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **given.pop("env_vars", {})}
    excludes = [*EXCLUDES, *_state_below(config, folder), *given.pop("excludes", [])]
    _check_size(folder, excludes)
    return {**given, "env_vars": variables, "working_dir": str(folder), "excludes": excludes}


def _read(file: str) -> dict[str, Any]:
    from ray.runtime_env import RuntimeEnv

    if not Path(file).is_file():
        raise UserError(f"--runtime-env={file} does not exist")
    try:
        given = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--runtime-env={file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise UserError(f"--runtime-env={file} must be a mapping, as in env_vars: {{AWS_REGION: eu-west-1}}")
    known = sorted({*RuntimeEnv.known_fields, "excludes"} - {"working_dir"})
    for key in given:
        if key == "working_dir":
            raise UserError(f"--runtime-env={file}: working_dir is the current folder: start the command elsewhere")
        if key not in known:
            raise UserError(f"--runtime-env={file}: unknown key '{key}'; {hint(str(key), known, most=20)}")
    try:
        RuntimeEnv(**{key: value for key, value in given.items() if key != "excludes"})
    except (TypeError, ValueError) as error:
        raise UserError(f"--runtime-env={file}: {' '.join(str(error).split())}") from error
    return given


def _state_below(config: Config, folder: Path) -> list[str]:
    """Patterns for data and runs that lie below the folder; a job reads them where they are."""
    here, found = folder.resolve(), []
    for value in (config.runs_dir, config.data.root, config.data.cache_dir, config.model.checkpoint):
        if value is not None and storage.is_local(value):
            place = storage.local_path(value).resolve()
            if here in place.parents:
                found.append(f"/{place.relative_to(here)}")
    return found


def _check_size(folder: Path, excludes: list[str]) -> None:
    """Raise UserError if Ray would refuse the folder, which it does only after packing all of it."""
    from ray._private.runtime_env import packaging  # noqa: PLC2701 (test_ray_private.py names it)

    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size

    respect = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    left_out = [packaging._get_excludes(folder, excludes)]
    packaging._dir_travel(folder, left_out, count, include_gitignore=respect, logger=logging.getLogger(__name__))
    total, limit = sum(sizes.values()), packaging.GCS_STORAGE_MAX_SIZE
    if total >= limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / _MIB:,.0f} MiB)" for name in largest)
        raise UserError(
            f"the current folder is sent as the job's working_dir, but holds {total / _MIB:,.0f} MiB of the "
            f"{limit / _MIB:,.0f} MiB that Ray takes: {named}; move it elsewhere, or name it in .rayignore"
        )
