"""The config of a call from Python: a network and data sets given as objects, with settings named as in YAML."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.spread import processes
from pipeline.cli import commands
from pipeline.data import given as data_given
from pipeline.network import given as network_given
from pipeline.run.events import Progress, ShardsCounted
from pipeline.run.state import as_begun, fingerprint
from pipeline.settings.config import Config, hashed, parse_config
from pipeline.settings.yaml_file import read_tree

ORIGIN = "the call"
SPLIT_SETTINGS = (
    "val_fraction",
    "test_fraction",
    "shard_samples",
    "build_workers",
)  # done with once shards are written


@dataclass(frozen=True)
class Call:
    """What a program gave.

    `model` is a network, a function that workers can import, its import path, or None for what `config` says. `sets`
    are train, val and test: data sets, or a folder of shards as train. `settings` are those of a config, by group.
    """

    model: Any = None
    sets: Mapping[str, Any] = field(default_factory=dict)
    config: str | Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    trust_code: bool = False
    in_process: bool = True

    @contextmanager
    def opened(self, progress: Progress, *, needs_data: bool = True) -> Iterator[Config]:
        """The config; the network is known to this process while the block lasts.

        Data sets are written as shards first. Without a name the run is called after its settings, network and data, so
        the same call goes on with its run, and another one begins another. Raises UserError.
        """
        tree = read_tree(self.config, []) if self.config is not None else {}
        tree = merged(tree, self.settings)
        if self.config is not None:
            named = "uri" in self.settings.get("tracking", {})
            trusted = self.trust_code or self.model is not None  # then the network is not the config's
            commands.require_trusted(self._before_data(tree), self.config, trusted, named)
        with self._model(tree) as model:
            tree["model"] = {**tree.get("model", {}), **model}
            if self.model is not None and model.get("trained"):
                tree["dense"] = {"epochs": 0, **tree.get("dense", {})}
            tree["data"] = self._data(tree, progress)
            config = commands.absolute(self._parsed(tree))
            if "name" not in tree:
                config = config.model_copy(update={"name": called(config)})
            config = as_begun(config)
            commands.require_fitting(config, ORIGIN, needs_data=needs_data)
            yield config

    def _model(self, tree: dict[str, Any]) -> Any:
        """A context that gives the settings under `model` which name the network."""
        model = self.model
        if model is None or isinstance(model, str):
            return nullcontext({} if model is None else {"factory": model})
        if isinstance(model, nn.Module):
            if not self.in_process:
                raise UserError(
                    f"model is a {type(model).__name__} of this process, which a cluster's workers cannot build: give "
                    "a function that they can import, as in model=my_module.build or model='my_module:build', and its "
                    "weights as model_settings={'checkpoint': ...}; or use engine='local'"
                )
            clash = {"factory", "kwargs", "checkpoint", "checkpoint_key", "trained"} & tree.get("model", {}).keys()
            if clash and self.config is None:
                raise UserError(
                    f"model_settings has {', '.join(sorted(clash))}, and model is the network itself: leave them out, "
                    "or give a function that makes the network as model"
                )
            tree["model"] = {key: value for key, value in tree.get("model", {}).items() if key not in clash}
            return network_given.held(model)
        return nullcontext({"factory": import_path(model)})

    def _data(self, tree: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """The settings under `data`; data sets are written as shards first."""
        given: dict[str, Any] = dict(tree.get("data", {}))
        train, *others = (self.sets.get(name) for name in ("train", "val", "test"))
        if train is None and all(other is None for other in others):
            if self.config is None and "source" not in given:
                raise UserError(
                    "train is missing: give a data set of (image, label), the folder of your shards, or "
                    "data={'source': 'folder', 'root': ...} (digits are scikit-learn's own)"
                )
            return given
        clash = {"source", "root"} & self.settings.get("data", {}).keys()
        if clash:
            raise UserError(f"data has {', '.join(sorted(clash))}, and train is given too: leave one of them out")
        if isinstance(train, str | Path):
            if any(other is not None for other in others):
                raise UserError(f"train='{train}' is a folder of shards, which holds val and test too: leave them out")
            return {**given, "source": "shards", "root": str(train)}
        config = commands.absolute(
            self._before_data({**tree, "data": {**given, "source": "shards", "root": "written below"}})
        )

        def counted(text: str, done: int, total: int) -> None:
            progress(ShardsCounted(text, done, total))

        spread = processes(config.data.build_workers)
        written = data_given.write(dict(self.sets), config.runs_dir, config.data, config.seed, counted, spread)
        kept = {key: value for key, value in given.items() if key not in SPLIT_SETTINGS}
        if "size" not in kept:
            if written.size is None or "resize" in kept:
                raise UserError(
                    "data.size is missing, and the images do not tell it (they differ in size, are not square, or are "
                    "resized): set it to the height and width that the network takes, as in data={'size': 224, "
                    "'resize': 256}"
                )
            kept["size"] = written.size
        return {"channels": written.channels, **kept, "source": "shards", "root": written.root}

    def _before_data(self, tree: dict[str, Any]) -> Config:
        """The config before data sets are looked at: only they tell how many numbers mean and std take."""
        data = dict(tree.get("data", {}))
        if any(value is not None for value in self.sets.values()) and "channels" not in data:
            data = {key: value for key, value in data.items() if key not in {"mean", "std"}}
        return self._parsed({**tree, "data": data})

    @staticmethod
    def _parsed(tree: dict[str, Any]) -> Config:
        """The config; one without a name gets one for the time being."""
        return parse_config({"name": "unnamed", **tree}, ORIGIN)


def merged(tree: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings with those of `more` in place of its own, group by group."""
    made = dict(tree)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(made.get(key), Mapping)
        made[key] = merged(made[key], value) if both else value
    return made


def called(config: Config) -> str:
    """A name for a run that was given none: its network's, and a hash of all that decides its result."""
    tree = hashed(config)
    for key in ("name", "runs_dir", "cluster", "tracking"):
        tree.pop(key, None)
    if config.data.root and f"/{data_given.FOLDER}/" in config.data.root:
        tree["data"]["root"] = storage.join(data_given.FOLDER, config.data.root.rpartition("/")[2])  # runs_dir may move
    label = config.model.factory.replace(":", ".").rpartition(".")[2]
    return f"{label}-{fingerprint(tree)[:10]}"


def import_path(function: Callable[..., Any]) -> str:
    """The import path of a function or class. Raises UserError where another process could not import it."""
    named = function.func if isinstance(function, functools.partial) else function
    module, name = getattr(named, "__module__", None), getattr(named, "__qualname__", None)
    if named is not function or module in (None, "__main__") or name is None or "<" in name:
        raise UserError(
            f"model is {str(function)[:100]}, which has no import path: give the network itself, as in model=build(), "
            "or a function of a module, as in model='my_module:build'"
        )
    return f"{module}:{name}"
