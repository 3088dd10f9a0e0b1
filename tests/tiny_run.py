"""A whole run in a few seconds, as a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from pipeline import stages
from pipeline.local import LocalEngine
from pipeline.run.events import Event
from pipeline.run.state import run_root
from pipeline.settings.config import Config
from pipeline.train.world import World, configure_process

# A whole run in a few seconds: real digits, two rounds, every stage.
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "size": 8, "mean": [0.3], "std": [0.38], "augment": ["shift"], "shift": 1, "lanes": 8},
    "model": {"factory": "lenet_300_100", "kwargs": {"inputs": 64, "dropout": 0.1}},
    "dense": {"epochs": 3, "batch_size": 64, "lr": 0.05, "checkpoint_steps": 10},
    "scan": {"levels": [0.5, 0.1]},
    "prune": {"rounds": 2},
    "retrain": {"epochs": 2, "batch_size": 64, "lr": 0.02, "checkpoint_steps": 7},
    "target": {"compression": 6},
    "tracking": {"enabled": False},
}
NO_SCAN = "prune.allocation=uniform"  # saves the seconds that Tune takes to start
# One round of heavy steps: workers whose driver was killed go on for two seconds or so, and must not finish it.
LONG_ROUND = [
    NO_SCAN, "data.resize=56", "data.size=56", "model.kwargs.inputs=3136", "prune.rounds=1",
    "prune.dense_control=false", "retrain.epochs=60", "retrain.checkpoint_steps=50",
]  # fmt: skip


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `a.b` keys of `changes` replaced; `base` stays as it is."""
    tree = yaml.safe_load(yaml.safe_dump(base))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return dict(tree)


def to_yaml(folder: Path) -> Path:
    """A tiny run as a file in a folder, for the command line; its runs go to `runs` beside it."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "runs_dir": str(folder / "runs")}))
    return path


ALONE = World(0, 1, torch.device("cpu"))


def carry_out(config: Config, events: list[Event] | None = None) -> dict[str, Any]:
    """A whole run in this process; returns its result.json."""
    configure_process(config.threads)
    return stages.run(config, LocalEngine(ALONE), (events if events is not None else []).append).to_json()


def final_weights(config: Config) -> dict[str, torch.Tensor]:
    return load_file(Path(run_root(config)) / "final/model.safetensors")


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
