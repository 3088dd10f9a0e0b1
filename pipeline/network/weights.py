"""Weights from a file into a network: which tensors the file holds, and under which names.

A file is read by its content, not by its ending. Its state dict may lie under one of the usual keys, and its names may
have a prefix: what fits the network decides. Nothing is unpickled but tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import few

State = dict[str, Tensor]


def load_weights(module: nn.Module, path: str | Path, key: str | None = None) -> None:
    """Load the state dict in a .safetensors file, or in one of torch.save, whatever its ending.

    It is the file itself, or lies under a key: `key` (model.checkpoint_key, dotted where it lies deeper), or by default
    the only one that fits. A prefix that all names have (DataParallel's "module.", "model.", "_orig_mod.") is taken
    off, or put before them, where the names fit the network then and not before. Raises UserError for a file that
    cannot be read as tensors, for several state dicts that fit, for missing or unexpected tensors, for shapes that
    differ, and for tensors that are no weights (whole or complex numbers, sparse).
    """
    wanted = module.state_dict(keep_vars=True)
    candidates = _state_dicts(_read(path), path, key)
    named = {name: _fitted(state, wanted) for name, state in candidates.items()}
    fitting = {name: given for name, given in named.items() if not _misfits(given, wanted)}
    if len(fitting) > 1:
        raise UserError(
            f"model.checkpoint '{path}' holds several state dicts that fit, under {few([*fitting])}: choose one with "
            f"model.checkpoint_key={next(iter(fitting))}"
        )
    if not fitting:
        closest = max(named.values(), key=lambda given: len(given.keys() & wanted.keys()))
        raise UserError(f"model.checkpoint '{path}' does not fit the network: {_explained(closest, wanted)}")
    (given,) = fitting.values()
    _require_weights(given, wanted, path)
    module.load_state_dict(given)


def stored_once(module: nn.Module, tensors: Mapping[str, Tensor]) -> State:
    """The tensors without those that `module` holds under an earlier name too; `load_weights` takes either."""
    first: dict[int, str] = {}
    aliases = {
        name
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and first.setdefault(id(tensor), name) != name
    }
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}


def _fitted(state: State, wanted: Mapping[str, Tensor]) -> State:
    """The state dict under the network's names: without a prefix or with one, and with what files leave out."""
    given = _renamed(state, wanted)
    by_identity = {id(wanted[name]): tensor for name, tensor in given.items() if name in wanted}
    for name, tensor in wanted.items():
        if name not in given and id(tensor) in by_identity:
            given[name] = by_identity[id(tensor)]  # tied tensors, of which safetensors keeps one
        elif name not in given and name.endswith("num_batches_tracked"):
            given[name] = tensor.detach()  # older files have no such counter, which only averaging would read
    return given


def _renamed(state: State, wanted: Mapping[str, Tensor]) -> State:
    """The tensors under the prefix, taken off or put on, that fits the most names; as they are where that fits best."""
    counters = "num_batches_tracked"  # which older files leave out
    last = max((name for name in wanted if not name.endswith(counters)), key=len, default="")
    choices = [dict(state)]
    for prefix in sorted({name.removesuffix(last) for name in state if name.endswith(f".{last}")}):
        choices.append({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    for name in sorted(state):
        if last.endswith(f".{name}"):
            choices.append({last.removesuffix(name) + each: tensor for each, tensor in state.items()})
    return max(choices, key=lambda given: len(given.keys() & wanted.keys()))  # the first of equals


def _misfits(given: State, wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What does not fit, by its kind; empty where all does."""
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
    return {what: names for what, names in problems.items() if names}


def _explained(given: State, wanted: Mapping[str, Tensor]) -> str:
    """What does not fit, in words; a head for another number of classes is named as that."""
    misfits = _misfits(given, wanted)
    matrices = [name for name, tensor in wanted.items() if isinstance(tensor, Tensor) and tensor.ndim >= 2]
    if misfits.keys() == {"shapes that differ"} and matrices:
        head = matrices[-1]
        bias = f"{head.rpartition('.')[0]}.bias"
        differing = {name for name in wanted if name in given and given[name].shape != wanted[name].shape}
        if head in differing <= {head, bias} and given[head].shape[1:] == wanted[head].shape[1:]:
            return (
                f"its head {head} is for {given[head].shape[0]} classes, the network's for {wanted[head].shape[0]}: "
                "set the number of classes in model.kwargs to that of the checkpoint (data.classes and the labels must "
                "fit), or train a head for this data first"
            )
    text = "; ".join(f"{what}: {few(names)}" for what, names in misfits.items())
    return f"{text}; set model.factory and model.kwargs to the network that was saved"


def _require_weights(given: State, wanted: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise UserError for tensors that are no weights, though their names and shapes fit."""
    for name, tensor in given.items():
        kind = None
        if tensor.layout != torch.strided:
            kind = "sparse"
        elif tensor.is_quantized:
            kind = "quantised"
        elif tensor.is_complex() and not wanted[name].is_complex():
            kind = "complex numbers"
        elif wanted[name].is_floating_point() and not tensor.is_floating_point():
            kind = f"whole numbers ({tensor.dtype})"
        if kind is not None:
            raise UserError(
                f"model.checkpoint '{path}': {name} is {kind}, and the network takes floating point: save it as "
                "dense floating-point numbers"
            )


def _read(path: str | Path) -> Mapping[Any, Any]:
    """What a file holds, read as its first bytes say."""
    if not storage.exists(path):
        raise UserError(f"model.checkpoint '{path}' does not exist; give the path of a file of weights")
    try:
        with storage.local_copy(path) as file:
            with open(file, "rb") as stream:
                first = stream.read(9)
            if first[8:] == b"{":  # eight bytes of length, then JSON
                content: Any = load_file(file)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in any way; none of them is worth a traceback
        raise UserError(
            f"model.checkpoint '{path}' cannot be read as tensors alone (safetensors, or torch.save with "
            f"weights_only): it is damaged, or holds other objects; save model.state_dict() by itself. "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"model.checkpoint '{path}' holds a {type(content).__name__}, not a state dict of tensors")
    return content


def _state_dicts(content: Mapping[Any, Any], path: str | Path, key: str | None) -> dict[str, State]:
    """Every state dict in what a file holds, by its key; one that is the whole file is under ""."""
    if key is not None:
        inner: Any = content
        for part in key.split("."):
            if not isinstance(inner, Mapping) or part not in inner:
                known = few([str(name) for name in inner]) if isinstance(inner, Mapping) else "no keys"
                raise UserError(f"model.checkpoint_key={key}: '{path}' has no '{part}' there, but {known}")
            inner = inner[part]
        if not _is_state(inner):
            raise UserError(f"model.checkpoint_key={key}: '{path}' holds no state dict of tensors there")
        return {key: dict(inner)}
    if _is_state(content):
        return {"": dict(content)}
    found = {str(name): dict(inner) for name, inner in content.items() if _is_state(inner)}
    if not found:
        tensors = {name for name, item in content.items() if isinstance(name, str) and isinstance(item, Tensor)}
        wrong = [str(name) for name in content if name not in tensors]
        raise UserError(
            f"model.checkpoint '{path}' holds entries that are not named tensors: {few(wrong)}"
            if wrong
            else f"model.checkpoint '{path}' is empty"
        )
    return found


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, Mapping)
        and bool(content)
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in content.items())
    )
