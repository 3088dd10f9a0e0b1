"""Networks, built in or by import path, and their weights."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import few, hint
from pipeline.base.seeding import derive
from pipeline.network.paper_networks import BUILTIN
from pipeline.settings.model import Model

# What other people's networks raise when they are given arguments or images that do not fit.
FOREIGN = (
    TypeError, ValueError, RuntimeError, LookupError, ArithmeticError, AttributeError, AssertionError, MemoryError
)  # fmt: skip


def build_network(model: Model, num_classes: int | None = None, seed: int = 0) -> nn.Module:
    """The network of the config, on the CPU, initialised from `seed` or from model.checkpoint.

    `num_classes` is passed to a factory that takes an argument `num_classes` or `classes`, or any keyword (as
    torchvision's do), unless model.kwargs sets one of the two. Raises UserError for a factory that cannot be imported,
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


def stored_once(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that `module` holds under an earlier name too; `load_weights` takes either."""
    first: dict[int, str] = {}
    aliases = {
        name
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) != name
    }
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state dict, bare or under "state_dict", from .safetensors or .pth/.pt; nothing is unpickled but tensors.

    A "module." before every name (DataParallel's) is taken off. Raises UserError for a file that cannot be read as
    tensors, and for missing or unexpected tensors or shapes.
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
