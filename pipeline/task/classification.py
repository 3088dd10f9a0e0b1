"""Classification of images: a batch's inputs, its losses, and what counts as a right answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.images import normalize
from pipeline.data.loader import Batch
from pipeline.settings.config import Config
from pipeline.settings.training import Retrain, Train


def forward(model: nn.Module, images: Tensor, config: Config, precision: str = "fp32") -> Tensor:
    """Logits (n, classes) for uint8 images (n, channels, size, size) on the model's device.

    float32, or float64 where the network gives that. Raises TypeError where it gives something else than a tensor.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits: Tensor = model(inputs(images, config))
    if not isinstance(logits, Tensor):
        raise TypeError(f"it gives a {type(logits).__name__}, not one tensor of logits")
    return logits if logits.dtype == torch.float64 else logits.float()


def inputs(images: Tensor, config: Config) -> Tensor:
    """What the network takes, float32, for uint8 images (n, channels, size, size), on their device."""
    channels_last = config.retrain.channels_last or config.dense.channels_last
    return normalize(images, config.data.mean, config.data.std, channels_last)


def judge(logits: Tensor, batch: Batch, present: Tensor | None) -> Tensor:
    """Five rows for a batch: right, right in 5, right among the classes present, loss, valid; shape (5, n)."""
    labels = batch.labels.to(logits.device)
    top5 = logits.topk(min(5, logits.shape[1]), dim=1).indices
    rows = torch.zeros(5, len(labels), dtype=torch.float64, device=logits.device)
    rows[0] = (logits.argmax(1) == labels).double()
    rows[1] = (top5 == labels[:, None]).any(1).double()
    if present is not None:
        rows[2] = (present[logits[:, present].argmax(1)] == labels).double()
    rows[3] = F.cross_entropy(logits, labels, reduction="none").double()
    rows[4] = batch.weights.to(logits.device).double()
    return rows


def losses(recipe: Train, logits: Tensor, labels: Tensor, taught: Tensor | None = None) -> Tensor:
    """The loss of each sample, (n,), in nats: cross-entropy with the labels, mixed with that with `taught`.

    `taught` are a teacher's logits of the same samples. Hinton et al. 2015, section 2: the Kullback-Leibler divergence
    of both softmaxes at a temperature, times its square, so that the gradients do not shrink with it.
    """
    plain = F.cross_entropy(logits, labels, reduction="none", label_smoothing=recipe.label_smoothing)
    if taught is None:
        return plain
    assert isinstance(recipe, Retrain)
    ours, theirs = ((given / recipe.temperature).log_softmax(1) for given in (logits, taught))
    apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * recipe.temperature**2
    return (1.0 - recipe.distill) * plain + recipe.distill * apart
