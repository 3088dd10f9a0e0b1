"""Networks of several outputs, of which a run uses the logits alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn


def of_logits(network: nn.Module) -> nn.Module:
    """The network itself, which from now on gives only the logits among its outputs."""
    network.register_forward_hook(_logits)
    return network


def forward_of(network: nn.Module) -> Callable[[nn.Module, Any], Any]:
    """What torch.fx is to trace: it does not see hooks, so a network of logits gets its hook's work in here."""
    forward: Callable[[nn.Module, Any], Any] = type(network).forward
    if _logits not in network._forward_hooks.values():
        return forward
    return lambda module, x: _logits(module, x, forward(module, x))


def _logits(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """A forward hook: the logits among a network's outputs; what has none stays as it is, and is refused later."""
    if isinstance(output, fx.Proxy):  # while torch.fx traces it: a step's output, which has every attribute
        return output
    if isinstance(getattr(output, "logits", None), Tensor | fx.Proxy):
        return output.logits
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor | fx.Proxy):
        return output[0]
    return output
