"""What is learnt, as a row of functions: nothing outside of `pipeline.task` knows what a batch means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.loader import Batch
from pipeline.settings.data import Data
from pipeline.settings.training import Train


@dataclass(frozen=True)
class Task:
    """A task. `n` is the number of samples of a batch; an output is what the network gives for a batch.

    shape(data): the shape of one sample as the network takes it, without n.
    inputs(images, data, channels_last): what the network takes, float32, for images uint8 (n, C, size, size).
    require_output(output, factory, classes): raises UserError where the network's output is of no use to the task.
    losses(recipe, output, labels, taught): the loss of each sample, (n,), in nats; `taught` is a teacher's output.
    mean_loss(output, labels): one number, the plain loss without the recipe's changes.
    judge(output, batch, present): five rows, (5, n): right, right in 5, right among the classes present, loss, valid.
    """

    shape: Callable[[Data], tuple[int, ...]]
    inputs: Callable[[Tensor, Data, bool], Tensor]
    require_output: Callable[[object, str, int], None]
    losses: Callable[[Train, Tensor, Tensor, Tensor | None], Tensor]
    mean_loss: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Tensor, Batch, Tensor | None], Tensor]
