"""Networks as other people's code builds them, for `bench_networks.py`; random weights, three channels."""

from __future__ import annotations

from functools import partial

import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification


def hugging_face_vit(num_classes: int) -> nn.Module:
    """A small ViT of Hugging Face; it answers with an object that holds `logits`."""
    return ViTForImageClassification(
        ViTConfig(
            num_labels=num_classes, hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768
        )
    )


class BertOnPatches(nn.Module):
    """BERT's encoder over the patches of an image (batch, 3, 224, 224), each projected to a token."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=1, hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768
        )
        self.project = nn.Conv2d(3, config.hidden_size, 16, 16)
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.project(images).flatten(2).transpose(1, 2)
        answers: Tensor = self.head(torch.mean(self.encoder(inputs_embeds=tokens).last_hidden_state, dim=1))
        return answers


timm_resnet = partial(timm.create_model, "resnet18")
timm_mobilenet = partial(timm.create_model, "mobilenetv3_small_100")
timm_mixer = partial(timm.create_model, "mixer_s32_224")
