"""Networks that know ImageNet's thousand classes, cut down to ten of them: the others' rows of the last layer go.

Configs of `bench_channels.py` name `trained` and `torch_pruned` as their factories.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from pipeline.network import cost

# Imagenette's classes among ImageNet's, in the order of its folders' names.
KEPT = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
SAMPLE = (3, 224, 224)
STEPS = 200  # in which torch-pruning goes from all channels to 5% of them; it stops where the FLOPs are few enough


def _squeezenet(classes: int) -> nn.Module:
    return torchvision.models.squeezenet1_1(num_classes=classes)


def _efficientnet_lite0(classes: int) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    made: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=classes)
    return made


class Network(NamedTuple):
    """How it is built for some classes, its file of weights in SECATEUR_DATA, its last layer, and its images' mean and
    standard deviation."""

    build: Callable[[int], nn.Module]
    weights: str
    last: str
    mean: list[float]
    std: list[float]


NETWORKS = {
    "squeezenet": Network(
        _squeezenet, "squeezenet1_1_imagenet.pth", "classifier.1", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ),
    "efficientnet-lite0": Network(_efficientnet_lite0, "efficientnet_lite0_imagenet.pth", "_fc", [0.498], [0.502]),
}


def trained(name: str, num_classes: int = len(KEPT)) -> nn.Module:
    """A network with its ImageNet weights, and of its last layer the rows of the ten classes."""
    known = NETWORKS[name]
    file = Path(os.environ["SECATEUR_DATA"], "weights", known.weights)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    rows = {key: value[list(KEPT)] for key, value in state.items() if key.startswith(f"{known.last}.")}
    network = known.build(num_classes)
    network.load_state_dict(state | rows)
    return network


def torch_pruned(name: str, compression: float, num_classes: int = len(KEPT)) -> nn.Module:
    """`trained`, cut by torch-pruning to 1/compression of its FLOPs or just below, by the norms of its groups."""
    return copy.deepcopy(_torch_pruned(name, compression, num_classes))


@functools.cache  # a run builds its network several times
def _torch_pruned(name: str, compression: float, num_classes: int) -> nn.Module:
    import torch_pruning

    network = trained(name, num_classes).eval()
    whole = flops(network)
    pruner = torch_pruning.pruner.BasePruner(
        network,
        torch.zeros(1, *SAMPLE),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.95,
        iterative_steps=STEPS,
        ignored_layers=[network.get_submodule(NETWORKS[name].last)],
    )
    while flops(network) * compression > whole:
        pruner.step()
    return network


def flops(network: nn.Module) -> int:
    """Of a forward pass on one image."""
    return sum(cost.flops(network, SAMPLE).values())
