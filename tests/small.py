"""A small network of every kind of layer, for 8x8 images, by import path: `model.factory=small:network`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

# The settings of a tiny run that takes it.
SMALL: dict[str, Any] = {"model": {"factory": "small:network"}}


def network(classes: int = 10, norm: bool = True, dropout: float = 0.5) -> nn.Module:
    parts: list[tuple[str, nn.Module]] = [("conv1", nn.Conv2d(1, 4, 3))]
    if norm:
        parts.append(("norm1", nn.BatchNorm2d(4)))
    parts += [("relu1", nn.ReLU()), ("flatten", nn.Flatten()), ("fc1", nn.Linear(144, 20)), ("relu2", nn.ReLU())]
    parts += [("drop1", nn.Dropout(dropout)), ("fc2", nn.Linear(20, classes))]
    return nn.Sequential(OrderedDict(parts))
