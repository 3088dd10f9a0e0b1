"""The operations that channels are followed through, by kind; any other is left alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNELWISE = ("weight", "bias", "running_mean", "running_var")  # tensors of norms and PReLU, a row for each channel
SAME = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE_POOLS = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
# Along how many axes a pool goes. It takes a tensor with one axis less for one sample, and pools its channels then.
POOLED: dict[Any, int] = {
    kind: count for kinds in (MAX_POOLS, AVG_POOLS, ADAPTIVE_POOLS[:3], ADAPTIVE_POOLS[3:])
    for count, kind in enumerate(kinds, 1)
} | {
    F.max_pool2d: 2, F.avg_pool2d: 2, F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_max_pool2d: 2
}  # fmt: skip
POINTWISE: set[Any] = {
    torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu,
    F.silu, F.mish, F.hardswish, F.hardsigmoid, F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid,
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp", "clamp_", torch.clamp, "abs", torch.abs,
    operator.neg,
}  # fmt: skip
COPIES: set[Any] = {"contiguous", "clone", torch.clone}  # the same numbers, perhaps in memory of their own
BINARY: set[Any] = {
    operator.add, operator.iadd, torch.add, "add", "add_", operator.sub, operator.isub, torch.sub, "sub", "sub_",
    operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.truediv, torch.div, "div", "div_",
    torch.maximum, torch.minimum,
}  # fmt: skip
QUOTIENTS: set[Any] = {operator.truediv, torch.div, "div", "div_"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
MATRIX_PRODUCTS: set[Any] = {operator.matmul, torch.matmul, "matmul"}
UNFLATTENS: set[Any] = {"unflatten", torch.unflatten}
RESHAPES: set[Any] = {"view", "reshape", torch.reshape, *UNFLATTENS}
FLATTENS: set[Any] = {"flatten", torch.flatten}
PERMUTES: set[Any] = {"permute", torch.permute}
TRANSPOSES: set[Any] = {"transpose", torch.transpose, "swapaxes", torch.swapaxes}
UNBINDS: set[Any] = {"unbind", torch.unbind}
CHUNKS: set[Any] = {"chunk", torch.chunk}
SOFTMAXES: set[Any] = {"softmax", torch.softmax, F.softmax}
CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate}
DROPOUT_FUNCTIONS: set[Any] = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
# torchvision's function, known by its name, so that torchvision is not needed here.
STOCHASTIC_DEPTH = ("torchvision.ops.stochastic_depth", "stochastic_depth")
ADAPTIVE_FUNCTIONS: set[Any] = {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
MAX_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
AVG_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def is_shape(node: fx.Node) -> bool:
    """Whether a step gives the whole shape of a tensor."""
    by_method = node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    return by_method or (node.target is getattr and str(node.args[1]) == "shape")


def dropout_arguments(target: Any) -> tuple[str, ...] | None:
    """The names of the arguments of a function that drops activations in training; None for any other."""
    if target in DROPOUT_FUNCTIONS:
        return ("input", "p", "training", "inplace")
    if (getattr(target, "__module__", None), getattr(target, "__name__", None)) == STOCHASTIC_DEPTH:
        return ("input", "p", "mode", "training")
    return None


def only_reads_size(node: fx.Node, rank: int, channels: Collection[int]) -> bool:
    """Whether a step asks for a size, a type or a device that compaction does not change.

    The tensor that it asks has `rank` axes, 0 where it is none; `channels` are the axes of its channels.
    """

    def another(axis: Any) -> bool:
        return isinstance(axis, int) and rank > 0 and axis % rank not in channels

    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if node.target is operator.getitem and source is not None and is_shape(source):
        return True  # judged where the whole shape was read
    if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
        return another(node.args[1])
    if node.target is getattr and node.args[1] in ("dtype", "device", "ndim"):
        return True
    picked = [user.args[1] for user in node.users if user.target is operator.getitem]
    return is_shape(node) and len(picked) == len(node.users) and all(map(another, picked))


def named_sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes (or axes) that a call of view, reshape, unflatten or permute names, one by one or in one list.

    None where they are given by keyword; one step where it makes all of them.
    """
    given = node.args[2:] if node.target in UNFLATTENS else node.args[1:]
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else given


def as_function(target: Any) -> Callable[..., Tensor]:
    """A function, or the method of a tensor that has this name."""
    found: Callable[..., Tensor] = getattr(Tensor, target) if isinstance(target, str) else target
    return found


def in_place(node: fx.Node) -> bool:
    """Whether a pointwise step changes its input: by its name (relu_), operator (+=) or `inplace=True`."""
    if any(given is True for given in (*node.args[1:], *node.kwargs.values())):
        return True
    if isinstance(node.target, str):
        return node.target.endswith("_")
    return node.target in (F.relu_, operator.iadd, operator.isub, operator.imul)
