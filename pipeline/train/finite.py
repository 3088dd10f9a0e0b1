"""Whether the gradients of steps were finite, learnt without making the device wait."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor


class Verdict(NamedTuple):
    """What a step's gradient was: `bad` is 1 on the host where it was not finite, once `known` has passed."""

    step: int
    rate: float
    bad: Tensor
    known: torch.cuda.Event | None


class Finite:
    """Notes each step's gradient on the device, and tells a step later, when the device has come to it anyway.

    What `note` returns makes a fused optimizer leave everything as it is, so a bad gradient never changes a weight. On
    the CPU there is nothing to wait for, and a step's verdict is told at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self._open: deque[Verdict] = deque()

    def note(self, step: int, rate: float, norm: Tensor) -> Tensor:
        """Note a gradient by its norm (on the device, no dimensions). 1 where it is not finite, else 0; float32."""
        bad = (~torch.isfinite(norm)).float()
        if bad.device.type == "cpu":
            self._open.append(Verdict(step, rate, bad, None))
            return bad
        copy = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
        self._open.append(Verdict(step, rate, copy, torch.cuda.current_stream(bad.device).record_event()))
        return bad

    def first_bad(self, lag: int = 0) -> Verdict | None:
        """The first step that was bad, of all but the last `lag` that were noted; each is looked at once."""
        while len(self._open) > lag:
            verdict = self._open.popleft()
            if verdict.known is not None:
                verdict.known.synchronize()
            if verdict.bad.numpy() != 0:
                return verdict
        return None
