"""A network's answers, sample by sample: what they come to, and what a run keeps of them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.base.stats import Z95, wilson
from pipeline.run.records import Evaluation, Figures

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class Marks:
    """Which samples were answered right, and which could be read: what a run keeps of answers. Shape (samples,)."""

    right: Bools
    valid: Bools

    def save(self) -> bytes:
        """An .npz file of these marks alone, with the arrays `right` and `valid`."""
        return _npz({"right": self.right, "valid": self.valid})

    @staticmethod
    def load(data: bytes, name: str | None = None) -> Marks:
        """The marks in an .npz file; in one of `save_marks` those of the network `name`."""
        with np.load(io.BytesIO(data), allow_pickle=False) as saved:
            return Marks(right=saved["right" if name is None else f"{name}_right"], valid=saved["valid"])


def save_marks(marks: Mapping[str, Marks]) -> bytes:
    """An .npz file of several networks' marks of the same samples: NAME_right of each network, and `valid`."""
    arrays: dict[str, Bools] = {}
    for name, each in marks.items():
        arrays |= {f"{name}_right": each.right, "valid": each.valid}
    return _npz(arrays)


@dataclass(frozen=True, eq=False, kw_only=True)
class Answers(Marks):
    """How a network answered each sample: arrays of shape (samples,).

    right5 is whether the label was among the five best, right_present whether it was the best of the classes that have
    samples (None where all have some). loss is in nats.
    """

    right5: Bools
    right_present: Bools | None
    loss: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Tensor, present: bool) -> Answers:
        """The answers in the rows of `judge`, (5, samples) on the CPU; `present` says whether the third one counts."""
        table = rows.numpy()
        return cls(
            right=table[0] > 0,
            right5=table[1] > 0,
            right_present=table[2] > 0 if present else None,
            loss=table[3],
            valid=table[4] > 0,
        )

    def metrics(self) -> Evaluation:
        """What the answers come to, over the readable samples."""
        count = max(1, int(self.valid.sum()))

        def share(right: Bools) -> float:
            return int((right & self.valid).sum()) / count

        return Evaluation(
            top1=share(self.right),
            top5=share(self.right5),
            loss=float(self.loss[self.valid].sum()) / count,
            top1_present=None if self.right_present is None else share(self.right_present),
        )

    def figures(self) -> Figures:
        """What the answers come to, over the readable samples, the same whatever the order of the samples.

        There must be a readable one.
        """
        right, count = int((self.right & self.valid).sum()), int(self.valid.sum())
        low, high = self.interval(Z95)
        loss = math.fsum(self.loss[self.valid]) / count  # exactly rounded: the order does not matter
        return Figures(top1=right / count, loss=loss, samples=count, low=low, high=high)

    def interval(self, z: float) -> tuple[float, float]:
        """Wilson's interval of top1, over the readable samples; z is the normal quantile of its confidence."""
        return wilson(int((self.right & self.valid).sum()), int(self.valid.sum()), z)

    def first(self, count: int) -> Answers:
        """The answers to the first `count` samples."""
        return Answers(
            right=self.right[:count],
            right5=self.right5[:count],
            right_present=None if self.right_present is None else self.right_present[:count],
            loss=self.loss[:count],
            valid=self.valid[:count],
        )


def _npz(arrays: Mapping[str, Bools]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
