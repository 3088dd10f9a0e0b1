"""The network of a finished run, in the user's own process: masked as it was trained, or compact."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.network import given
from pipeline.network.build import build_network
from pipeline.network.compact import compact
from pipeline.network.logits import of_logits
from pipeline.network.weights import load_weights
from pipeline.run.layout import DENSE, standing
from pipeline.run.records import DataFacts
from pipeline.run.state import Run, config_of
from pipeline.settings import trust
from pipeline.settings.config import Config
from pipeline.task.feed import Feed
from pipeline.train import checkpoint


def compact_of(run_dir: str | Path, model: nn.Module | None = None, trust_code: bool = False) -> nn.Module:
    """The compact network of a finished run, in evaluation mode, on the CPU; raises as `masked_of` does."""
    example = Feed.of(config_of(run_dir)).zeros(2, torch.device("cpu"))
    return compact(masked_of(run_dir, model, trust_code), example).model


def masked_of(run_dir: str | Path, model: nn.Module | None = None, trust_code: bool = False) -> nn.Module:
    """The pruned network of a finished run in its dense shapes, in evaluation mode, on the CPU.

    `model` is the network whose weights are replaced, in a copy that gives logits alone; by default it is built as the
    run's config says.
    Raises UserError for a run that is not finished, and where its config names a network by import path (unless
    `trust_code`).
    """
    config, here = config_of(run_dir), Run(str(run_dir), 0)
    require_finished(here)
    if model is None:
        require_known_code(config, run_dir, trust_code)
        plain = config.model.model_copy(update={"checkpoint": None})  # which may be gone, and is replaced
        network = build_network(plain, here.load(DataFacts, "data.json").classes, config.seed)
    else:
        network = of_logits(given.copied(model))
    load_weights(network, here.path("final", "model.safetensors"))
    return network.eval()


def masks_of(run_dir: str | Path) -> dict[str, Tensor]:
    """The masks of a run's network as it stands: bool tensors on the CPU by parameter, True keeps.

    Of a run in which no round was accepted all weights of result.json's layers are kept. Raises UserError for what is
    no run, and for one that has no round yet.
    """
    config_of(run_dir)
    here = Run(str(run_dir), 0)
    folder = standing(here)
    if folder == DENSE:
        require_finished(here)
    masks = checkpoint.load(here, f"{folder}/checkpoint").masks
    if masks:
        return masks
    weights = checkpoint.load(here, f"{folder}/checkpoint").weights
    names = [layer["name"] for layer in here.read("result.json")["layers"]]
    return {name: torch.ones_like(weights[name], dtype=torch.bool) for name in names}


def require_known_code(config: Config, run_dir: str | Path, trust_code: bool) -> None:
    """Raise UserError where a run's config names a network by import path, unless that code is trusted."""
    if config.model.factory != given.FACTORY:  # that one says by itself that it is not here
        trust.require_known_code(config.model, f"run '{run_dir}'", trust_code)


def require_finished(here: Run) -> None:
    """Raise UserError for a run without its final network."""
    if not storage.exists(here.path("final", "model.safetensors")):
        raise UserError(
            f"'{here.root}' has no final/model.safetensors: carry the run to its end first, with the command that "
            "started it (secateur run)"
        )
