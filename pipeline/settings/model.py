"""Settings of the network."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from pipeline.settings.base import Section, Text, plain


class Model(Section):
    """The network."""

    factory: Text = Field(
        "lenet_300_100",
        description="lenet_300_100, lenet_5 (Caffe's), alexnet_caffe (two groups), vgg_16, or an import path: "
        "torchvision.models.squeezenet1_1, my_module:build.",
    )
    kwargs: Annotated[dict[str, Any], AfterValidator(plain)] = Field(
        default_factory=dict, description="Keyword arguments of the factory."
    )
    checkpoint: Text | None = Field(
        None, description="Weights to start from: a .safetensors file, or one of torch.save loaded with weights_only."
    )
    checkpoint_key: Text | None = Field(
        None,
        description="Where the state dict lies in the file, such as ema or model.state; by default the only one that "
        "fits the network.",
    )
    trained: bool = Field(
        False, description="The factory brings trained weights, as timm's pretrained=True does: dense.epochs may be 0."
    )
    licence: Text | None = Field(
        None,
        description="Licence of the weights, such as apache-2.0, for the model card (final/README.md); by default the "
        "card says that it is not stated. It changes no result.",
    )
