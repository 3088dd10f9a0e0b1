"""Networks, built in or by import path, their weights, and what of them can be pruned."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from pipeline import config
from pipeline.cost import CONVOLUTIONS, LAYERS, NORMS
from pipeline.data import storage
from pipeline.errors import UserError
from pipeline.names import few, hint
from pipeline.networks import BUILTIN, alexnet_caffe, lenet_5, lenet_300_100, vgg_16
from pipeline.seeding import derive

__all__ = [
    "BUILTIN", "FOREIGN", "LeftOut", "Prunable", "alexnet_caffe", "build", "lenet_5", "lenet_300_100", "load_weights",
    "survey", "vgg_16",
]  # fmt: skip


# What a network of somebody else's raises when it is given arguments or images that it was not made for.
FOREIGN = (
    TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, AssertionError, MemoryError
)  # fmt: skip


def build(model: config.Model, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The network of the config, on the CPU, initialised from `seed` or from model.checkpoint.

    `num_classes` is given to the factory where it takes an argument of that name, or `classes`, or any keyword (as
    torchvision's do) and model.kwargs says nothing of either. Raises UserError for a factory that cannot be imported,
    does not take its arguments, or makes no nn.Module, and for a checkpoint that does not fit.
    """
    factory = _factory(model.factory)
    kwargs = {**_class_argument(factory, model.kwargs, num_classes), **model.kwargs}
    # devices=[]: only the CPU's generator is touched, and it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "init"))
        try:
            network = factory(**kwargs)
        except FOREIGN as error:
            raise UserError(
                f"model.factory='{model.factory}' does not work with the arguments {str(kwargs)[:300]} (model.kwargs "
                f"and the number of classes): {' '.join(str(error).split())[:300] or type(error).__name__}"
            ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model.factory='{model.factory}' made a {type(network).__name__}, not a torch.nn.Module; name a function "
            "or class that returns the network"
        )
    if model.checkpoint is not None:
        load_weights(network, model.checkpoint)
    return network


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state dict, bare or under "state_dict", from .safetensors or .pth/.pt; nothing is unpickled but tensors.

    A "module." before every name (DataParallel's) is taken off. Raises UserError for a file that cannot be read so, or
    that lacks tensors, has others, or others' shapes.
    """
    given = _read_tensors(path)
    if given and all(name.startswith("module.") for name in given):
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    wanted = module.state_dict(keep_vars=True)
    by_identity = {id(wanted[name]): tensor for name, tensor in given.items() if name in wanted}
    for name, tensor in wanted.items():
        if name not in given and id(tensor) in by_identity:
            given[name] = by_identity[id(tensor)]  # tied tensors, of which safetensors keeps one
        elif name not in given and name.endswith("num_batches_tracked"):
            given[name] = tensor.detach()  # older files have no such counter, which only averaging would read
    shapes = [
        f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and isinstance(tensor, Tensor) and given[name].shape != tensor.shape
    ]
    problems = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "shapes that differ": shapes,
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {few(names)}" for what, names in problems.items() if names)
        raise UserError(
            f"model.checkpoint '{path}' does not fit the network: {text}; set model.factory and model.kwargs to the "
            "network that was saved"
        )
    module.load_state_dict(given)


@dataclass(frozen=True)
class Prunable:
    """A weight tensor that may be pruned: its first name, the layer that holds it, and other names of the same one."""

    name: str
    module: nn.Module
    kind: str  # "fc" or "conv"
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

    Prunable are the weights of linear and convolution layers (grouped ones too) whose names match a pattern of
    `include` and none of `exclude`. A tensor that several layers share counts once, under its first name; shared with
    anything else (an embedding) it is left out, since pruning it would prune there too. Raises UserError for a pattern
    that matches nothing and where nothing is left to prune.
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
        kind = "conv" if isinstance(owner, CONVOLUTIONS) else "fc"
        able.append(Prunable(name, owner, kind, shape, tensor.numel(), aliases))
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


def _factory(path: str) -> Callable[..., Any]:
    """The callable that model.factory names: a built-in, package.mod.attr or package.mod:attr."""
    if "." not in path and ":" not in path:
        if path in BUILTIN:
            return BUILTIN[path]
        raise UserError(
            f"model.factory='{path}' is unknown; {hint(path, BUILTIN)}; or an import path such as my_module:build"
        )
    where, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not where or not attribute:
        raise UserError(f"model.factory='{path}' is not an import path; write package.module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module beside the config
    try:
        found: Any = importlib.import_module(where)
    except (ImportError, SyntaxError, TypeError, ValueError) as error:  # the last two for a name that is none
        raise UserError(
            f"model.factory='{path}': module '{where}' cannot be imported: {error}; it must be installed or lie under "
            f"{os.getcwd()}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"model.factory='{path}': '{where}' has no '{part}'; {hint(part, _public(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"model.factory='{path}' is a {type(found).__name__}, not a function or class")
    factory: Callable[..., Any] = found
    return factory


def _public(thing: Any) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_")]


def _class_argument(factory: Callable[..., Any], given: Mapping[str, Any], classes: int | None) -> dict[str, int]:
    """The keyword by which the factory takes the number of classes, or nothing."""
    if classes is None or "classes" in given or "num_classes" in given:
        return {}
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a factory written in C has no signature to read
        return {}
    for name in ("num_classes", "classes"):
        if name in parameters:
            return {name: classes}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"num_classes": classes} if takes_any else {}


def _read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every named tensor in a file."""
    if not storage.exists(path):
        raise UserError(f"model.checkpoint '{path}' does not exist; give the path of a .safetensors, .pth or .pt file")
    suffix = PurePosixPath(str(path)).suffix
    if suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"model.checkpoint '{path}' must end in .safetensors, .pth or .pt, not '{suffix}'")
    try:
        with storage.local_copy(path) as file:
            if suffix == ".safetensors":
                content: Any = load_file(file)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in any way; none of them is worth a traceback
        raise UserError(
            f"model.checkpoint '{path}' cannot be read as tensors alone (weights_only): it is damaged, or holds "
            f"other objects; save model.state_dict() by itself. {' '.join(str(error).split())[:200]}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise UserError(f"model.checkpoint '{path}' holds a {type(content).__name__}, not a state dict of tensors")
    wrong = [str(name) for name, item in content.items() if not (isinstance(name, str) and isinstance(item, Tensor))]
    if wrong:
        raise UserError(f"model.checkpoint '{path}' holds entries that are not named tensors: {few(wrong)}")
    return dict(content)


def _shared_reason(module: nn.Module, users: list[tuple[str, Tensor]]) -> str | None:
    """Why a parameter cannot be pruned, judged by every place where it is used; None if it can."""
    for name, tensor in users:
        path, _, attribute = name.rpartition(".")
        reason = _reason(module.get_submodule(path), attribute, tensor)
        if reason is not None:
            return reason if len(users) == 1 else f"shared by {few([n for n, _ in users])}: {reason}"
    return None


def _reason(owner: nn.Module, attribute: str, tensor: Tensor) -> str | None:
    """Why one use of a parameter keeps it from being pruned; None if it is a plain layer's weight."""
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
        if "quantized" in type(owner).__module__ or ".qat" in type(owner).__module__:
            return f"quantised layer ({kind})"
        if type(tensor.data) is not Tensor or not tensor.is_floating_point():
            return f"quantised: holds {tensor.dtype} in a {type(tensor.data).__name__}, not plain floating point"
        return "empty" if tensor.numel() == 0 else None
    if isinstance(owner, NORMS):
        return f"normalisation ({kind})"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return "embedding (a table that is looked up, not multiplied)"
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return f"transposed convolution ({kind})"
    return f"parameter of a {kind}, which is neither a linear nor a convolution layer"


def _quantised(module: nn.Module) -> list[LeftOut]:
    """The weights of quantised layers, which are no parameters: they hold packed integers."""
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
