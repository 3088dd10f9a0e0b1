"""The run directory: which stages are finished, what they were made from, and who may write."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.record import Record, plain
from pipeline.base.version import VERSION
from pipeline.run import lease
from pipeline.run.records import RunFacts, StageMarker
from pipeline.settings.config import UNHASHED, Config, differences, dump_config, load_begun
from pipeline.settings.pruning import Start

EARLY = ("log", "course", "machines", "ray", "shards")  # folders of a run that has made nothing yet
# Settings that change how a run is carried out, but not its results. They may differ when it resumes.
OPERATIONAL = (
    "runs_dir", "cluster", "tracking", "data.decode_threads", "data.cache_bytes", "data.cache_dir",
    "data.cache_disk_bytes", *UNHASHED,
)  # fmt: skip

MARKER = "finished.json"  # in a stage's folder, written last

R = TypeVar("R", bound=Record)


def fingerprint(*parts: Any) -> str:
    """A short hash of plain values: the same values give the same text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A run directory and the right to write into it.

    `fence` and `token` are what the lease had when this writer started. A later driver raises the number and has
    another token, and then every write of this writer is refused: orphans of a killed run cannot write. `alive` raises
    Lost where this process holds the lease, and it has ended.
    """

    root: str
    fence: int
    token: str | None = None
    alive: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """The same writer in another process, such as a worker: the lease's clock stays with its holder."""
        return Run, (self.root, self.fence, self.token)

    def path(self, *parts: str) -> str:
        """Where a file of the run lies."""
        return storage.join(self.root, *parts)

    def commit(self, value: Any, *parts: str) -> None:
        """Write a JSON file, of a record or of plain values, atomically, if this writer still holds the run."""
        storage.write_json(self.path(*parts), plain(value), self.check_fence)

    def commit_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file atomically, if this writer still holds the run."""
        storage.write_bytes(self.path(*parts), data, self.check_fence)

    def remove(self, *parts: str) -> None:
        """Delete a file, if this writer still holds the run; nothing happens if it is not there."""
        storage.remove(self.path(*parts), self.check_fence)

    def remove_tree(self, *parts: str) -> None:
        """Delete a folder and all that is in it, if this writer still holds the run."""
        storage.remove_tree(self.path(*parts), self.check_fence)

    def read(self, *parts: str) -> Any:
        """A JSON file of the run."""
        return storage.read_json(self.path(*parts))

    def load(self, kind: type[R], *parts: str) -> R:
        """The record that a JSON file of the run holds. Raises UserError where it holds something else."""
        return kind.from_json(self.read(*parts), self.path(*parts))

    def has(self, *parts: str) -> bool:
        """Whether a file of the run exists."""
        return storage.exists(self.path(*parts))

    def marker(self, stage: str) -> StageMarker | None:
        """The marker of a finished stage, or None."""
        return self.load(StageMarker, stage, MARKER) if self.has(stage, MARKER) else None

    def finished(self, stage: str, made_from: str) -> bool:
        """Whether the stage is finished, and its fingerprint is the same."""
        marker = self.marker(stage)
        return marker is not None and marker.made_from == made_from

    def finish(self, stage: str, made_from: str, seconds: float) -> None:
        """Mark a stage as finished; written after everything else of the stage."""
        self.commit(StageMarker(made_from, round(seconds, 3), now_ms()), stage, MARKER)

    def check_fence(self) -> None:
        """Raise RunStopped if another driver has taken the run over, or may have. Called before each try of a write."""
        self.alive()
        lease.require(self.root, self.fence, self.token)


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow counts time."""
    return time.time_ns() // 1_000_000


def run_root(config: Config) -> str:
    """The folder of the run that `config` describes."""
    return storage.join(config.runs_dir, config.name)


@contextmanager
def open_run(config: Config, tell: Callable[[str], None] = warnings.warn) -> Iterator[Run]:
    """Create or reopen a run and hold its lease; `tell` is told why this takes a while.

    Raises UserError when the run was made with other settings, or is being written by a live process.
    """
    root = run_root(config)
    if storage.is_local(root):
        _make_folder(root, config.runs_dir)
    with lease.hold(root, config.cluster.lease_seconds, lambda: _check_config(root, config), tell) as held:
        run = Run(root, held.fence, held.token, held.alive)
        storage.remove_leftovers(root)
        if _changed(root, config):  # of a run that has made nothing but shards: see _check_config
            _forget_shards(run)
        if not run.has("run.json"):
            run.commit(RunFacts(uuid.uuid4().hex, config.name, now_ms(), VERSION), "run.json")
        run.commit_bytes(dump_config(config).encode(), "config.yaml")
        yield run


def source_root(start: Start, runs_dir: str) -> str:
    """The folder of the run that `start.from` names: a name under runs_dir, a path or a URL."""
    return start.run if "/" in start.run else storage.join(runs_dir, start.run)


def as_begun(config: Config) -> Config:
    """The config with what its run began with, where it was not given anew: how images become pixels.

    A run that is still to begin takes it from the run that `start.from` names.
    """
    if "decoder" in config.data.model_fields_set:
        return config
    roots = [run_root(config), *([source_root(config.start, config.runs_dir)] if config.start.source else [])]
    for file in (storage.join(root, "config.yaml") for root in roots):
        if storage.exists(file):
            data = config.data.model_copy(update={"decoder": load_begun(file).data.decoder})
            data.model_fields_set.discard("decoder")  # nobody gave it
            return config.model_copy(update={"data": data})
    return config


def _make_folder(root: str, runs_dir: str) -> None:
    try:
        storage.local_path(root).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runs_dir={runs_dir} cannot be written: {error.strerror}") from error


def _changed(root: str, config: Config) -> list[str]:
    """The settings in which a run's config differs from a new one; the folder's name may have changed."""
    file = storage.join(root, "config.yaml")
    return differences(load_begun(file), config, ignore=(*OPERATIONAL, "name")) if storage.exists(file) else []


def _has_begun(root: str) -> bool:
    """Whether a run holds more than what it says of itself and its shards, as one does that was refused before."""
    return any(name not in EARLY for name in storage.list_folders(root))


def _forget_shards(run: Run) -> None:
    """Remove shards that may be those of other settings."""
    run.remove_tree("shards")
    if run.has("data.json"):
        run.remove("data.json")


def _check_config(root: str, config: Config) -> None:
    """Raise UserError where a run that has made something was begun with other settings."""
    changed = _changed(root, config)
    if changed and _has_begun(root):
        before = load_begun(storage.join(root, "config.yaml"))
        raise UserError(
            f"run '{root}' was started with other settings ({'; '.join(changed)}): use another name=..., also with "
            f"start.from={before.name}:0 to take its dense network and scan, or remove the folder to start over"
        )


def config_of(run_dir: str | Path) -> Config:
    """The config of an existing run, its runs_dir being where the run lies now.

    Raises UserError where the folder is no run, or holds links that lead out of it.
    """
    file = storage.join(run_dir, "config.yaml")
    if not storage.exists(file):
        raise UserError(f"'{run_dir}' is not a run: it has no config.yaml; give a folder such as runs/demo")
    storage.require_closed(run_dir)
    place = str(storage.local_path(run_dir).resolve()) if storage.is_local(run_dir) else str(run_dir).rstrip("/")
    runs_dir, _, name = place.rpartition("/")
    return load_begun(file).model_copy(update={"runs_dir": runs_dir, "name": name})
