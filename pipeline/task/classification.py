"""Classification of images: a batch's inputs, its losses, and what counts as a right answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base.errors import UserError
from pipeline.data.images import normalize
from pipeline.data.loader import Batch
from pipeline.settings.data import Data
from pipeline.settings.training import Retrain, Train
from pipeline.task.task import Task


def shape(data: Data) -> tuple[int, int, int]:
    """(channels, height, width) of one image."""
    return data.channels, data.size, data.size


def inputs(images: Tensor, data: Data, channels_last: bool) -> Tensor:
    """Normalised images, float32, for uint8 ones (n, channels, size, size), on their device."""
    return normalize(images, data.mean, data.std, channels_last)


def require_output(output: object, factory: str, classes: int) -> None:
    """Raise UserError where the output is not one of logits (n, at least `classes`)."""
    if not isinstance(output, Tensor):
        raise UserError(f"model.factory={factory} gives a {type(output).__name__}, not a tensor of logits")
    if output.ndim != 2 or output.shape[1] < classes:
        raise UserError(
            f"model.factory={factory} gives outputs of shape {tuple(output.shape)}, but the data has {classes} "
            "classes: set the number of classes in model.kwargs"
        )


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


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy with the labels, in nats."""
    return F.cross_entropy(logits, labels)


TASK = Task(shape, inputs, require_output, losses, mean_loss, judge)
