"""What a training sums over an epoch, on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.base import seeding
from pipeline.train.world import World

MASK64 = 2**64 - 1


class Tally:
    """The sums of an epoch so far: the losses, the readable samples, the bad ones, and a digest of their order.

    `totals` are those of all ranks up to the last `collect`. Each rank keeps what came after it, which a step
    checkpoint holds rank by rank: so a save in between does not change the last bits of the sums.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.totals = [0.0, 0.0, 0.0]
        self.order = 0
        self.here = torch.zeros(3, dtype=torch.float64, device=world.device)
        self.order_here = 0

    def add(self, step: int, indices: NDArray[np.int64], loss: Tensor, valid: Tensor) -> None:
        """Add this rank's part of a step: sample numbers (n,), the sum of the losses, and 0 for a bad sample (n,)."""
        self.order_here += seeding.order_digest(step, indices)
        bad = (valid == 0).sum()
        self.here += torch.stack([loss.double(), len(valid) - bad.double(), bad.double()])

    def collect(self) -> None:
        """Bring all ranks' sums into the totals; every rank does it at the same step."""
        gathered = self.world.sum(self.here).tolist()
        self.totals = [old + new for old, new in zip(self.totals, gathered, strict=True)]
        self.here.zero_()
        self.order, self.order_here = self._whole_order(), 0

    def mean_loss(self) -> float:
        """The mean loss of the epoch so far: all ranks' up to the last `collect`, this rank's after it; 0 of none."""
        loss, samples, _ = (old + new for old, new in zip(self.totals, self.here.tolist(), strict=True))
        return loss / samples if samples else 0.0

    @property
    def order_text(self) -> str:
        """The digest of which samples were seen at which step, up to the last `collect`."""
        return f"{self.order & MASK64:016x}"

    def state(self) -> Mapping[str, Any]:
        """What a step checkpoint holds of it, the same on every rank, which all ask at the same step."""
        rows = torch.zeros(self.world.size, 3, dtype=torch.float64, device=self.world.device)
        rows[self.world.rank] = self.here
        return {"totals": self.totals, "running": self.world.sum(rows).tolist(), "order": self._whole_order()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a step checkpoint, of as many ranks or others; older ones were saved after a `collect`."""
        self.totals, self.order, self.order_here = list(state["totals"]), state["order"], 0
        rows = torch.tensor(state.get("running") or [[0.0] * 3], dtype=torch.float64)
        if len(rows) == self.world.size:
            self.here.copy_(rows[self.world.rank])
        elif self.world.first:
            self.here.copy_(rows.sum(0))

    def _whole_order(self) -> int:
        """The digest of all ranks up to now: a sum modulo 2^64, whose parts may be added in any order."""
        here = torch.tensor([_wrap(self.order_here)], dtype=torch.int64, device=self.world.device)
        return _wrap(self.order + int(self.world.sum(here)))


def _wrap(value: int) -> int:
    """An integer modulo 2^64, as a signed one."""
    return ((value + 2**63) & MASK64) - 2**63
