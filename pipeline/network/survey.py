"""Which tensors of a network can be pruned, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from pipeline.base.errors import UserError
from pipeline.base.names import few, hint
from pipeline.network.layers import ATTENTION, CONVOLUTIONS, LAYERS, NORMS, PROJECTIONS


@dataclass(frozen=True)
class Prunable:
    """A weight tensor that may be pruned: its first name, the layer that holds it, and its other names (`aliases`)."""

    name: str
    module: nn.Module
    kind: str  # "fc", "conv" or "attention"
    shape: tuple[int, ...]
    weights: int
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is not pruned, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def survey(
    module: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> tuple[list[Prunable], list[LeftOut]]:
    """Every parameter, in definition order: prunable, or left out with the reason.

    Prunable are the weights of linear and convolution layers (grouped ones too), and the projections of attention
    (`in_proj_weight`), whose names match a pattern of `include` and none of `exclude`. A tensor that several layers
    share counts once, under its first name. If it is also shared with another kind of module (an embedding) it is left
    out, since that module would be pruned too. Raises UserError for a pattern that matches nothing, and where nothing
    is left to prune.
    """
    uses: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append((name, parameter))
    able: list[Prunable] = []
    left_out = _quantised(module)
    for users in uses.values():
        (name, tensor), aliases = users[0], tuple(alias for alias, _ in users[1:])
        shape = () if isinstance(tensor, UninitializedParameter) else tuple(tensor.shape)
        reason = _shared_reason(module, users)
        if reason is not None:
            left_out.append(LeftOut(name, shape, reason))
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        able.append(Prunable(name, owner, _kind(owner), shape, tensor.numel(), aliases))
    names = [name for users in uses.values() for name, _ in users]
    _require_matches("prune.exclude", exclude, names)
    _require_matches("prune.include", include, [name for item in able for name in (item.name, *item.aliases)] or names)
    reasons = {item.name: _pattern_reason(item, include, exclude) for item in able}
    prunable = [item for item in able if reasons[item.name] is None]
    left_out += [LeftOut(item.name, item.shape, str(reasons[item.name])) for item in able if reasons[item.name]]
    order = {name: place for place, name in enumerate(names)}
    left_out.sort(key=lambda item: order.get(item.name, len(order)))
    if not prunable:
        listed = few([f"{item.name} ({item.reason})" for item in left_out]) or "it has no parameters"
        raise UserError(f"model.factory: nothing in the network can be pruned: {listed}")
    return prunable, left_out


def _kind(owner: nn.Module) -> str:
    if isinstance(owner, ATTENTION):
        return "attention"
    return "conv" if isinstance(owner, CONVOLUTIONS) else "fc"


def _shared_reason(module: nn.Module, users: list[tuple[str, Tensor]]) -> str | None:
    """Why a parameter cannot be pruned, judged by every place where it is used; None if it can."""
    for name, tensor in users:
        path, _, attribute = name.rpartition(".")
        reason = _reason(module.get_submodule(path), attribute, tensor)
        if reason is not None:
            return reason if len(users) == 1 else f"shared by {few([n for n, _ in users])}: {reason}"
    return None


def _reason(owner: nn.Module, attribute: str, tensor: Tensor) -> str | None:
    """Why one use of a parameter keeps it from being pruned; None if it is a weight to multiply by."""
    kind = type(owner).__name__
    if isinstance(tensor, UninitializedParameter):
        return f"{kind} is lazy: its shape is known after the first batch only"
    if isinstance(owner, ParametrizationList):
        return "parametrised: the weight is computed from it; fold it in first (remove_parametrizations)"
    if attribute.endswith("bias"):
        return "bias"
    if isinstance(owner, LAYERS):
        if attribute != "weight":
            return f"{kind} computes its weight from it (weight norm or torch.nn.utils.prune); fold it in first"
        return _unfit(owner, tensor)
    if isinstance(owner, ATTENTION) and attribute in PROJECTIONS:
        return _unfit(owner, tensor)
    if isinstance(owner, NORMS):
        return f"normalisation ({kind})"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding (a table that is looked up, not multiplied)"
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return f"transposed convolution ({kind})"
    return f"parameter of a {kind}, which is neither a linear nor a convolution layer"


def _unfit(owner: nn.Module, tensor: Tensor) -> str | None:
    """Why a weight that is multiplied by is of no kind that can be pruned; None if it is."""
    if "quantized" in type(owner).__module__ or ".qat" in type(owner).__module__:
        return f"quantised layer ({type(owner).__name__})"
    if type(tensor.data) is not Tensor or not tensor.is_floating_point():
        return f"quantised: holds {tensor.dtype} in a {type(tensor.data).__name__}, not plain floating point"
    return "empty" if tensor.numel() == 0 else None


def _quantised(module: nn.Module) -> list[LeftOut]:
    """The weights of quantised layers. These are packed integers, not parameters."""
    found = []
    for path, part in module.named_modules():
        weight = getattr(part, "weight", None) if "quantized" in type(part).__module__ else None
        if callable(weight):
            name = f"{path}.weight" if path else "weight"
            found.append(LeftOut(name, tuple(weight().shape), f"quantised layer ({type(part).__name__})"))
    return found


def _require_matches(setting: str, patterns: Sequence[str], names: list[str]) -> None:
    for pattern in patterns:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"{setting}: '{pattern}' matches no tensor; {hint(pattern, names)}")


def _pattern_reason(item: Prunable, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    names = (item.name, *item.aliases)
    for pattern in exclude:
        if any(fnmatchcase(name, pattern) for name in names):
            return f"excluded by prune.exclude '{pattern}'"
    if not any(fnmatchcase(name, pattern) for name in names for pattern in include):
        return f"not in prune.include {[*include]}"
    return None
