"""Checkpoints: one folder with weights, masks, optimizer and position, and a manifest of SHA-256 written last.

A folder without a manifest, or with a file that does not match it, is torn: it is passed over with a
warning and the checkpoint before it is used. Random state needs no file, since every draw is derived
from the seed and the position (`pipeline.base.seeding`).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.prune import masks as masking
from pipeline.run.state import Run

FORMAT = 1
FILES = ("weights.safetensors", "optimizer.safetensors", "masks.bin", "state.json")  # the only ones that are read


@dataclass
class Checkpoint:
    """What a training needs to go on: tensors by name, and plain values."""

    weights: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class Torn(UserError):
    """A checkpoint that was never completed, or was damaged since."""


def save(run: Run, folder: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into `folder` (relative to the run). The manifest makes it valid."""
    files = {
        "weights.safetensors": save_safetensors(plain_tensors(checkpoint.weights)),
        "optimizer.safetensors": save_safetensors(plain_tensors(checkpoint.optimizer)),
        "masks.bin": masking.pack_bits(checkpoint.masks),
        "state.json": json.dumps(checkpoint.state, sort_keys=True).encode(),
    }
    for name, data in files.items():
        run.commit_bytes(data, folder, name)
    manifest = {
        "format": FORMAT,
        "masked": {name: list(mask.shape) for name, mask in checkpoint.masks.items()},
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    run.commit(manifest, folder, "manifest.json")


def load(run: Run, folder: str) -> Checkpoint:
    """Read a checkpoint. Raises Torn that says what is wrong with it."""
    where = run.path(folder)
    try:
        manifest = json.loads(storage.read_bytes(run.path(folder, "manifest.json")))
    except FileNotFoundError as error:
        raise Torn(f"checkpoint '{where}' has no manifest.json: it was never completed") from error
    except (ValueError, RecursionError) as error:
        raise Torn(f"checkpoint '{where}' is torn: its manifest.json is not valid JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Torn(f"checkpoint '{where}' has a manifest of another format than {FORMAT}: it cannot be read")
    try:
        files = {name: _whole(run, folder, name, manifest["files"][name]) for name in FILES}
        shapes = {name: tuple(shape) for name, shape in manifest["masked"].items()}
        state = json.loads(files["state.json"])
        return Checkpoint(
            weights=_by_name(load_safetensors(files["weights.safetensors"])),
            masks=masking.unpack_bits(files["masks.bin"], shapes),
            optimizer=_by_name(load_safetensors(files["optimizer.safetensors"])),
            state=dict(state),
        )
    except (LookupError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise Torn(f"checkpoint '{where}' is torn: what it holds is not what a run writes ({error!r})") from error


def digest(run: Run, folder: str, name: str) -> str:
    """The SHA-256 of a checkpoint's file (one of FILES), read from its manifest."""
    return str(run.read(folder, "manifest.json")["files"][name]["sha256"])


def _whole(run: Run, folder: str, name: str, facts: dict[str, Any]) -> bytes:
    """A file of a checkpoint. Raises Torn if it is missing or does not match the manifest."""
    try:
        data = storage.read_bytes(run.path(folder, name))
    except FileNotFoundError:
        data = b""
    if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise Torn(f"checkpoint '{run.path(folder)}' is torn: {name} does not match its SHA-256 in the manifest")
    return data


def step_folder(phase: str, step: int) -> str:
    """The folder of the checkpoint that a phase saves after `step` updates."""
    return f"{phase}/steps/{step:08d}"


def latest(run: Run, phase: str) -> Checkpoint | None:
    """The newest whole step checkpoint of a phase, or None."""
    for name in reversed(storage.list_folders(run.path(phase, "steps"))):
        try:
            return load(run, f"{phase}/steps/{name}")
        except Torn as error:
            warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
    return None


def keep_last(run: Run, phase: str, count: int) -> None:
    """Remove all but the last `count` step checkpoints of a phase."""
    if count == 0:
        run.remove_tree(phase, "steps")
        return
    for name in storage.list_folders(run.path(phase, "steps"))[:-count]:
        run.remove_tree(phase, "steps", name)


def plain_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory, as safetensors requires (tied weights are stored twice)."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _by_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sorted by name: safetensors returns tensors in another order each time, so files made from them would differ."""
    return {name: tensors[name] for name in sorted(tensors)}
