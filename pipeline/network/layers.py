"""The kinds of module that hold, follow or precede prunable tensors, told apart in one place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# Attention multiplies by parameters of its own: queries, keys and values in one, or one each where their sizes differ.
ATTENTION = (nn.MultiheadAttention,)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


DROPOUTS = (nn.modules.dropout._DropoutNd,)


ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold,
    nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
)  # fmt: skip


def layers_by_tensor(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The linear and convolution layers that hold each weight, by the tensor's first name, in definition order."""
    names: dict[int, str] = {}
    found: dict[str, list[nn.Module]] = {}
    for path, layer in module.named_modules():
        weight = layer._parameters.get("weight") if isinstance(layer, LAYERS) else None
        if weight is not None:
            name = names.setdefault(id(weight), f"{path}.weight" if path else "weight")
            found.setdefault(name, []).append(layer)
    return found


def weights_by_tensor(module: nn.Module) -> dict[str, Tensor]:
    """The weights of linear and convolution layers and the projections of attention, by first name, in order.

    Weights without plain memory (lazy ones, quantised ones) are left out.
    """
    names: dict[int, str] = {}
    held: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        multiplied = isinstance(owner, LAYERS) and attribute == "weight"
        projects = isinstance(owner, ATTENTION) and attribute in PROJECTIONS
        plain = not isinstance(parameter, UninitializedParameter) and type(parameter.data) is Tensor
        if (multiplied or projects) and plain and parameter.layout is torch.strided:
            held[first] = parameter
    return held
