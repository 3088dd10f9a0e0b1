"""A network whose answers are not numbers once in a while, as of a broken device, as long as a file is there."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pipeline.network.paper_networks import lenet_300_100


class Broken(nn.Module):
    """The network given; from training step `after` on its answers are NaN where the file `switch` is."""

    def __init__(self, network: nn.Module, switch: str, after: int) -> None:
        super().__init__()
        self.network, self.switch, self.after = network, Path(switch), after
        self.steps = 0

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.network(images)
        self.steps += self.training
        return answers * float("nan") if self.steps > self.after and self.switch.exists() else answers


def network(switch: str, after: int, classes: int = 10) -> nn.Module:
    return Broken(lenet_300_100(64, classes), switch, after)
