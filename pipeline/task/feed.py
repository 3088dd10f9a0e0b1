"""How a run's batches are given to its network: the task, and the settings that its inputs rest on.

To add a task, write its functions in a module of this package and put its row into TASKS.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.names import lookup
from pipeline.settings.config import Config
from pipeline.settings.data import Data
from pipeline.task import classification
from pipeline.task.task import Task

TASKS: dict[str, Task] = {"classification": classification.TASK}


def task_of(name: str) -> Task:
    """The task of this name. Raises UserError for an unknown one."""
    return lookup(TASKS, name, "task")


def computing(device: torch.device, precision: str, cache: bool = False) -> AbstractContextManager[Any]:
    """In the block forward passes on `device` compute in a precision, fp32 or bf16.

    With `cache`, a weight is cast once in it, else each time that it is used: it may be pruned in between.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=cache)


@dataclass(frozen=True)
class Feed:
    """What turns batches of uint8 images into a network's outputs; `seed` is the run's, for draws among samples.

    `eval_precision` is that of evaluation and scan: fp32 or bf16.
    """

    task: Task
    data: Data
    channels_last: bool
    seed: int
    eval_precision: str = "fp32"

    @classmethod
    def of(cls, config: Config) -> Feed:
        """That of a run. Raises UserError for an unknown task."""
        channels_last = config.dense.channels_last or config.retrain.channels_last
        return cls(task_of(config.task), config.data, channels_last, config.seed, config.eval_precision)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample as the network takes it."""
        return self.task.shape(self.data)

    def zeros(self, samples: int, device: torch.device | None = None) -> Tensor:
        """An example of the network's input: (samples, *shape), float32."""
        return torch.zeros(samples, *self.shape, device=device)

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on `device`, in the memory format of the run, which only tensors of four dimensions have."""
        model = model.to(device)
        if self.channels_last:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.ndim == 4:
                    tensor.data = tensor.data.to(memory_format=torch.channels_last)
        return model

    def inputs(self, images: Tensor) -> Tensor:
        """What the network takes, float32, for uint8 images (n, channels, size, size), on their device."""
        return self.task.inputs(images, self.data, self.channels_last)

    def forward(self, model: nn.Module, images: Tensor, precision: str = "fp32") -> Tensor:
        """The network's output for uint8 images (n, channels, size, size) on its device.

        float32, or float64 where the network gives that. Raises TypeError where it gives something else than a tensor.
        """
        with computing(images.device, precision, cache=True):
            output: Tensor = model(self.inputs(images))
        if not isinstance(output, Tensor):
            raise TypeError(f"it gives a {type(output).__name__}, not one tensor of logits")
        return output if output.dtype == torch.float64 else output.float()
