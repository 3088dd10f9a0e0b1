"""Networks that know ImageNet's thousand classes, cut down to ten of them: the others' rows of the last layer go.

A config of `bench_channels.py` names them; both take a file of weights and the ten numbers of `KEPT`.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

# Imagenette's classes among ImageNet's, in the order of its folders' names.
KEPT = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def squeezenet(num_classes: int, weights: str) -> nn.Module:
    """SqueezeNet 1.1, whose last layer is a 1x1 convolution."""
    network = torchvision.models.squeezenet1_1(num_classes=num_classes)
    network.load_state_dict(_cut(weights, "classifier.1"))
    return network


def efficientnet_lite0(num_classes: int, weights: str) -> nn.Module:
    """EfficientNet-Lite0, as the package efficientnet-lite-pytorch 0.1.0 builds it."""
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", override_params={"num_classes": num_classes})
    network.load_state_dict(_cut(weights, "_fc"))
    return network


def _cut(weights: str, last: str) -> dict[str, Tensor]:
    """The tensors of a file; of those of the last layer, the rows of ten classes."""
    state: dict[str, Tensor] = torch.load(weights, weights_only=True)
    return {name: value[list(KEPT)] if name.startswith(f"{last}.") else value for name, value in state.items()}
