"""What `mlflow.pyfunc.load_model` calls for a network that is kept as tensors and settings: nothing is unpickled.

The data of such a model are laid out as a run's folder is, so `secateur.load` reads them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.base.errors import UserError
from pipeline.export.load import masked_of
from pipeline.run.state import config_of
from pipeline.settings import trust

MODULE = "pipeline.tracking.loader"  # as MLflow imports it; models that are in MLflow name it
TRUST = "trust_code"


class Loaded:
    """A network as MLflow calls it."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def predict(self, given: Any, params: Mapping[str, Any] | None = None) -> dict[str, NDArray[np.float32]]:
        """Logits (batch, classes) as "output", of float32 images (batch, channels, size, size), alone or as "input"."""
        images = given["input"] if isinstance(given, Mapping) else given
        with torch.no_grad():
            return {"output": self.network(torch.as_tensor(np.asarray(images, np.float32))).numpy()}


def _load_pyfunc(path: str, settings: Mapping[str, Any] | None = None) -> Loaded:
    """The network in a folder. Raises UserError where it would run code that nobody trusted."""
    trusted = bool((settings or {}).get(TRUST))
    model = config_of(Path(path)).model
    if trust.needs_trust(model) and not trusted:
        raise UserError(
            f"this model is the network model.factory='{model.factory}', and to build it would run that code: if you "
            f'trust whoever wrote it, give model_config={{"{TRUST}": True}} to load_model'
        )
    return Loaded(masked_of(Path(path), trust_code=trusted))
