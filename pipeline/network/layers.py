"""The kinds of module that hold, follow or precede prunable tensors, told apart in one place."""

from __future__ import annotations

from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


DROPOUTS = (nn.modules.dropout._DropoutNd,)


ACTIVATIONS = (
    nn.ReLU, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Threshold,
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
