"""A network that is slow, or out of memory, on one rank once a file is there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.network.paper_networks import lenet_300_100


class Moody(nn.Module):
    """The network given; on rank 1, while training and while the file `switch` is there, it does as `mood` says.

    slow: a step takes a second longer. memory: the step raises what torch raises where a GPU is full.
    """

    def __init__(self, network: nn.Module, switch: str, mood: str) -> None:
        super().__init__()
        self.network, self.switch, self.mood = network, Path(switch), mood

    def forward(self, images: Tensor) -> Tensor:
        if self.training and os.environ.get("RANK") == "1" and self.switch.exists():
            if self.mood == "slow":
                time.sleep(1)
            else:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        answers: Tensor = self.network(images)
        return answers


def network(switch: str, mood: str, inputs: int = 64, dropout: float = 0.0, classes: int = 10) -> nn.Module:
    return Moody(lenet_300_100(inputs, classes, dropout=dropout), switch, mood)
