"""Networks that a Python program gives as objects, named in settings as any other network is.

A run builds its network anew in many places: for each stage, for the teacher, for a check. Each gets a deep copy of the
object, in the process that was given it. Nothing is pickled, so another process cannot build it: on a cluster the
network is named by an import path, which workers import.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.base.errors import UserError

FACTORY = "pipeline.network.given:network"
_HELD: dict[str, nn.Module] = {}
_EVERY_MODULES = vars(nn.Module()).keys()  # attributes by which torch keeps its books
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_VALUES = (Tensor, torch.dtype, functools.partial, *_FUNCTIONS)
_HOLDERS = (tuple, list, dict, set, frozenset)


@contextmanager
def held(module: nn.Module) -> Iterator[dict[str, Any]]:
    """While the block lasts, the network is known in this process; gives the settings under `model` that name it.

    The name is a digest of its class, layers and weights, so the same network given again goes on with its run. Its
    weights and mode stay as they are. Raises UserError for what is no network that can be copied.
    """
    _require_plain(module)
    made = copied(module)
    key = digest(made)
    before = _HELD.get(key)
    _HELD[key] = made
    try:
        yield {"factory": FACTORY, "kwargs": {"digest": key}, "trained": True}
    finally:
        if before is None:
            del _HELD[key]


def network(digest: str) -> nn.Module:
    """A copy of the network that was given under this digest. Raises UserError where this process was given none."""
    if digest not in _HELD:
        raise UserError(
            f"the network of this run was given as a Python object (digest {digest}), which only the program that gave "
            "it holds: give it again as model=..., in Python"
        )
    return copied(_HELD[digest])


def copied(module: nn.Module) -> nn.Module:
    """A copy on the CPU. Raises UserError for what is no nn.Module, or cannot be copied."""
    if not isinstance(module, nn.Module):
        raise UserError(f"model is a {type(module).__name__}, not a torch.nn.Module: give the network itself")
    try:
        return copy.deepcopy(module).cpu()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"model, a {type(module).__name__}, cannot be copied ({' '.join(str(error).split())[:200]}): give a "
            "function that makes it, by an import path such as my_module:build"
        ) from error


def _require_plain(module: Any) -> None:
    """Raise UserError for a network that is compiled, or not of float32."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError("model is compiled by torch.jit: give the network that it was made of")
    if hasattr(module, "_orig_mod"):
        raise UserError(
            "model is compiled by torch.compile, and each of its copies would be compiled anew: give the network that "
            "it was made of (model._orig_mod); with compile=True the run compiles it"
        )
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    other = {each.dtype for each in parameters if each.is_floating_point()} - {torch.float32}
    if other:
        raise UserError(f"model is of {other.pop()}, and images are float32: give model.float()")


def digest(module: nn.Module) -> str:
    """24 hex digits of a SHA-256 over the class, the layers as they print, other attributes, and every tensor.

    Other attributes are numbers, flags, texts, tensors, types of number and functions that a module holds, also in
    tuples, lists, dicts and sets, and whether a parameter is trained. A function counts by its name, a lambda by what
    it does. The code of classes and functions is not in it.
    """
    kind = type(module)
    total = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__}\n{module}".encode())
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        plain.pop("training", None)
        total.update(f"\n{name} {sorted(plain.items())}".encode())
        if more := sorted((key, _described(value)) for key, value in vars(part).items() if _counts(part, key, value)):
            total.update(repr(more).encode())
    total.update(repr([name for name, each in module.named_parameters() if not each.requires_grad]).encode())
    saved = module.state_dict()
    for name, tensor in saved.items():
        if isinstance(tensor, Tensor):
            total.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            total.update(_bytes(tensor))
    if unsaved := [(name, _described(each)) for name, each in module.named_buffers() if name not in saved]:
        total.update(repr(unsaved).encode())
    return total.hexdigest()[:24]


def _counts(part: nn.Module, key: str, value: object) -> bool:
    """Whether an attribute that is no plain value is of a network's own; torch's modules print their tuples."""
    if key in _EVERY_MODULES:
        return False
    of_torch = type(part).__module__.startswith("torch.nn.")
    return isinstance(value, _VALUES) or (isinstance(value, _HOLDERS) and not of_torch)


def _described(value: Any) -> str:
    """A value as text, the same in every process; what is of no known kind is its class."""
    if isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | None):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    if isinstance(value, functools.partial):
        return _described(("partial", value.func, value.args, value.keywords))
    if isinstance(value, dict):
        return _described([*value.items()])
    if isinstance(value, set | frozenset):
        return f"set {sorted(map(_described, value))}"
    if isinstance(value, tuple | list):
        return repr([*map(_described, value)])
    if isinstance(value, _FUNCTIONS):
        name = f"{value.__module__} {value.__qualname__} {value.__name__}"
        if isinstance(value, types.FunctionType) and value.__name__ == "<lambda>":
            code = value.__code__
            name += _described((code.co_code, code.co_names, code.co_consts))
        return name
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
