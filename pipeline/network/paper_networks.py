"""The paper's networks, with the layer names of its tables (and of Caffe's prototxt files)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

Parts = list[tuple[str, nn.Module]]


def lenet_300_100(inputs: int = 784, classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """LeNet-300-100: (batch, ...) with `inputs` values a sample to (batch, classes); 266,610 parameters by default."""
    parts: Parts = [("flatten", nn.Flatten())]
    for number, (before, after) in enumerate([(inputs, 300), (300, 100)], start=1):
        parts += [(f"fc{number}", nn.Linear(before, after)), (f"relu{number}", nn.ReLU())]
        if dropout > 0:
            parts.append((f"drop{number}", nn.Dropout(dropout)))
    return nn.Sequential(OrderedDict([*parts, ("fc3", nn.Linear(100, classes))]))


def lenet_5(classes: int = 10) -> nn.Module:
    """Caffe's LeNet-5: (batch, 1, 28, 28) to (batch, classes); 431,080 parameters; no ReLU after the convolutions."""
    parts: Parts = [
        ("conv1", nn.Conv2d(1, 20, 5)),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(800, 500)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(500, classes)),
    ]
    return nn.Sequential(OrderedDict(parts))


def alexnet_caffe(classes: int = 1000, dropout: float = 0.5) -> nn.Module:
    """Caffe's AlexNet, the paper's: (batch, 3, 227, 227) to (batch, classes); 60,965,224 parameters by default.

    conv2, conv4 and conv5 are in two groups, and local response normalisation stands between ReLU and pooling, as in
    bvlc_alexnet. torchvision's AlexNet is another network: no groups, no normalisation, fewer channels. The paper's
    fc1 to fc3 are fc6 to fc8 here. The first weights are Caffe's: Gaussian, made for pixels of 0..255 less their mean.
    """
    parts: Parts = [
        *_caffe_conv(1, nn.Conv2d(3, 96, 11, stride=4), bias=0.0),
        *_norm_and_pool(1),
        *_caffe_conv(2, nn.Conv2d(96, 256, 5, padding=2, groups=2), bias=0.1),
        *_norm_and_pool(2),
        *_caffe_conv(3, nn.Conv2d(256, 384, 3, padding=1), bias=0.0),
        *_caffe_conv(4, nn.Conv2d(384, 384, 3, padding=1, groups=2), bias=0.1),
        *_caffe_conv(5, nn.Conv2d(384, 256, 3, padding=1, groups=2), bias=0.1),
        ("pool5", nn.MaxPool2d(3, stride=2)),
    ]
    classifier = _classifier(256 * 6 * 6, classes, dropout)
    for name, layer in classifier:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01 if name == "fc8" else 0.005)
            nn.init.constant_(layer.bias, 0.0 if name == "fc8" else 0.1)
    return nn.Sequential(OrderedDict([*parts, *classifier]))


def vgg_16(classes: int = 1000, dropout: float = 0.5) -> nn.Module:
    """VGG-16 (configuration D): (batch, 3, 224, 224) to (batch, classes); 138,357,544 parameters by default.

    Layers have the names of the paper's table 5, conv1_1 to fc8. The first weights are Glorot's, by which the authors
    of VGG found that it trains without pretraining a shallower one (Simonyan & Zisserman 2015, section 3.1).
    """
    parts: Parts = []
    before = 3
    for block, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1):
        for number in range(1, count + 1):
            name = f"{block}_{number}"
            parts += [
                (f"conv{name}", nn.Conv2d(before, channels, 3, padding=1)),
                (f"relu{name}", nn.ReLU(inplace=True)),
            ]
            before = channels
        parts.append((f"pool{block}", nn.MaxPool2d(2)))
    parts += _classifier(512 * 7 * 7, classes, dropout)
    for _, layer in parts:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(OrderedDict(parts))


def _caffe_conv(number: int, layer: nn.Conv2d, bias: float) -> Parts:
    """A convolution with the first values of bvlc_alexnet, and its ReLU."""
    nn.init.normal_(layer.weight, std=0.01)
    assert layer.bias is not None
    nn.init.constant_(layer.bias, bias)
    return [(f"conv{number}", layer), (f"relu{number}", nn.ReLU(inplace=True))]


def _norm_and_pool(number: int) -> Parts:
    norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)  # alpha over the window's size, in Caffe as in torch
    return [(f"norm{number}", norm), (f"pool{number}", nn.MaxPool2d(3, stride=2))]


def _classifier(inputs: int, classes: int, dropout: float) -> Parts:
    """fc6, fc7 of 4,096 units and fc8, which AlexNet and VGG share."""
    parts: Parts = [("flatten", nn.Flatten())]
    for number, before in ((6, inputs), (7, 4096)):
        parts += [(f"fc{number}", nn.Linear(before, 4096)), (f"relu{number}", nn.ReLU(inplace=True))]
        if dropout > 0:
            parts.append((f"drop{number}", nn.Dropout(dropout)))
    return [*parts, ("fc8", nn.Linear(4096, classes))]


BUILTIN: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": lenet_300_100,
    "lenet_5": lenet_5,
    "alexnet_caffe": alexnet_caffe,
    "vgg_16": vgg_16,
}
