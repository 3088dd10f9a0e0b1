"""A network with a gate that a test closes, so that a run stands still at a certain moment until the test opens it."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.network.paper_networks import lenet_300_100

FACTORY = "faults.gated:network"
_VARIABLE = "SECATEUR_TEST_GATE"  # names the gate's file to the processes of a run


class Gate:
    """The test's side: a file that is there as long as the gate is closed.

    Closed, it holds each forward in one mode ("train" or "eval") from the moment on that a file matches `pattern`.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def environment(self) -> dict[str, str]:
        """What a run needs in order to see the gate."""
        return {_VARIABLE: str(self.file)}

    def close(self, mode: str, folder: Path, pattern: str) -> None:
        """Hold what comes once a file below `folder` matches."""
        self._set({"mode": mode, "folder": str(folder), "pattern": pattern})

    def _set(self, what: dict[str, Any]) -> None:
        self.file.with_suffix(".new").write_text(json.dumps(what))
        self.file.with_suffix(".new").rename(self.file)

    def slow(self, seconds: float) -> None:
        """Let each forward of a training take so much longer, until the gate is opened."""
        self._set({"slow": seconds})

    def held(self) -> set[int]:
        """The processes that stand at the gate."""
        return {int(path.suffix[1:]) for path in self.file.parent.glob(f"{self.file.name}.*") if path.suffix != ".new"}

    def open(self) -> None:
        """Let everybody go on, for ever."""
        self.file.unlink()


def _hold(file: Path, module: nn.Module, _: Any) -> None:
    while file.exists():
        try:
            gate = json.loads(file.read_text())
        except FileNotFoundError:  # opened in between
            return
        if "slow" in gate:
            time.sleep(gate["slow"] if module.training else 0.0)
            return
        closed = module.training == (gate["mode"] == "train")
        if not closed or not any(Path(gate["folder"]).glob(gate["pattern"])):
            return
        Path(f"{file}.{os.getpid()}").touch()
        time.sleep(0.01)


def network(inputs: int, classes: int, dropout: float) -> nn.Module:
    """LeNet-300-100; it stops at the gate that the environment names."""
    made = lenet_300_100(inputs, classes, dropout)
    if _VARIABLE in os.environ:
        made.register_forward_pre_hook(partial(_hold, Path(os.environ[_VARIABLE])))
    return made
