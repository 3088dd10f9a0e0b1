"""What model.factory names: found, and found fit to make a network, before it is called."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.base import blame
from pipeline.base.errors import UserError
from pipeline.base.names import hint
from pipeline.network.paper_networks import BUILTIN
from pipeline.settings.trust import is_torchvisions

_TORCHVISION = "torchvision.models"


def find(path: str) -> Callable[..., Any]:
    """The callable that model.factory names: a built-in, package.mod.attr or package.mod:attr.

    Raises UserError for what cannot be imported, and for what is no subclass of nn.Module, nor a Python function of
    the user's or of a library that could return one.
    """
    if "." not in path and ":" not in path:
        if path in BUILTIN:
            return BUILTIN[path]
        raise UserError(
            f"model.factory='{path}' is unknown; {hint(path, BUILTIN)}; or an import path such as my_module:build"
        )
    where, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not where or not attribute:
        raise UserError(f"model.factory='{path}' is not an import path; write package.module:function")
    _refuse_standard_library(path, where)
    found: Any = _module(path, where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(
                f"model.factory='{path}': '{where}' has no '{part}'; {hint(part, _public(found))}{blame.clash(where)}"
            )
        found = getattr(found, part)
    _require_maker(path, found)
    factory: Callable[..., Any] = found
    return factory


def _module(path: str, where: str) -> Any:
    """The imported module. torchvision is taken from where it is installed, not from the working directory."""
    if not is_torchvisions(path) and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module beside the config
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raised = blame.place(error)
        missing = error.name if isinstance(error, ImportError) else None
        said = blame.text(error) if raised else " ".join(str(error).split())
        remedy = "mend it" if raised else f"it must be installed or lie under {os.getcwd()}"
        raise UserError(
            f"model.factory='{path}': module '{where}' cannot be imported: {said}; {blame.clash(missing)[2:] or remedy}"
        ) from error


def _require_maker(path: str, found: Any) -> None:
    """Raise UserError for what is not meant to make a network: it is never called."""
    maker = found
    while isinstance(maker, functools.partial):
        maker = maker.func
    if isinstance(maker, types.MethodType):  # Net.from_name, a class method
        maker = maker.__func__
    is_network = isinstance(maker, type) and issubclass(maker, nn.Module)
    if not is_network and not isinstance(maker, types.FunctionType):
        raise UserError(
            f"model.factory='{path}' is a {type(found).__name__}, not a function or class that makes a "
            "torch.nn.Module; name one that does"
        )
    home = maker.__module__ or ""
    _refuse_standard_library(path, home)
    if is_torchvisions(path) and not f"{home}.".startswith(f"{_TORCHVISION}."):
        raise UserError(f"model.factory='{path}' is of {home}, not of {_TORCHVISION}; name it by its own module")
    if not is_network and (other := _other_kind(maker)):
        raise UserError(
            f"model.factory='{path}' returns {other} by its annotation, not a torch.nn.Module; name a function or "
            "class that makes the network"
        )


def _refuse_standard_library(path: str, module: str) -> None:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UserError(
            f"model.factory='{path}' is of Python's standard library ({top}), which makes no torch.nn.Module; name a "
            "function or class that does (a module of your own by that name needs another one)"
        )


def _other_kind(function: types.FunctionType) -> str | None:
    """The class that a function returns by its annotation where that can be no network, else None."""
    try:
        returned = typing.get_type_hints(function).get("return")
        if not isinstance(returned, type) or issubclass(returned, nn.Module) or issubclass(nn.Module, returned):
            return None
    except (NameError, TypeError, AttributeError, SyntaxError):  # text that means nothing here, or a protocol
        return None
    return returned.__name__


def _public(thing: Any) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_")]
