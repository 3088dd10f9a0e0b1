"""manifest.json: the contents of the shards beside it, so that any sample can be read without a search.

It is small; what it says of each sample lies in a file of columns beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import columns
from pipeline.data.columns import Damaged, Described, Rows, Shard, Shards
from pipeline.data.parts import SPLITS
from pipeline.settings.base import short

NAME = "manifest.json"
VERSION = 2
_OLD_VERSION = 1
IMAGES = ("jpg", "jpeg", "png")
_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,18}\s*")
MOST_CLASSES = 10**6
MOST_SHARDS = 10**8
_LONGEST_NAME = 1024  # bytes
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COLUMNS = re.compile(r"manifest-[0-9a-f]{16}\.columns")
_AGAIN = "run `secateur shards index` (or `shards build`) again"
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]*")  # a file beside the manifest, not a hidden one


@dataclass(frozen=True, eq=False)
class Manifest:
    """The shards of a data set.

    `num_classes` is the size of the label space. `label` is where a sample keeps its label (cls, or a
    field of its json). `holdout` is set only where no val shards exist: the samples of train that are val are held out
    by their shards. `made_from` is a hash of what the shards were made from. `own_val` is false where the val shards
    were drawn from the source's train part when they were built; older manifests do not say. `identity` is a short hash
    of what the shards hold (`identity_of`).
    """

    classes: tuple[str, ...]
    num_classes: int
    label: str
    splits: dict[str, Shards]
    holdout: bool
    made_from: str
    own_val: bool
    identity: str

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples train, val and test have, those held out of train counted as val."""
        stored = {split: int(self.splits[split].used.sum()) if split in self.splits else 0 for split in SPLITS}
        held = int(self.splits["train"].held.sum())
        return {**stored, "train": stored["train"] - held, "val": stored["val"] + held}

    @property
    def val_is_cut_from_train(self) -> bool:
        """Whether val was drawn from what the source calls train."""
        return self.holdout or not self.own_val

    @property
    def shards(self) -> list[Shard]:
        """All shards, split after split."""
        return [shard for split in SPLITS if split in self.splits for shard in self.splits[split]]


def identity_of(
    made_from: str, label: str, num_classes: int, splits: Mapping[str, Shards], held: Sequence[tuple[int, int]] | None
) -> str:
    """A hash of what shards hold: their checksums in order, and which samples are used as what.

    `held` are the (shard, sample) numbers of train that are val, None where val has shards of its own.
    """
    left_out = {
        split: [shards.rows(number).skipped.tolist() if shards[number].skipped else () for number in range(len(shards))]
        for split, shards in splits.items()
    }
    facts = {
        split: [(shard.name, shard.sha256, skipped) for shard, skipped in zip(shards, left_out[split], strict=True)]
        for split, shards in splits.items()
    }
    text = json.dumps([made_from, label, num_classes, held, facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def held_out(train: Shards) -> list[tuple[int, int]]:
    """The (shard, sample) numbers of train that are val, rising."""
    return [(number, sample) for number, rows in enumerate(train.all_rows()) for sample in rows.held.tolist()]


@dataclass(frozen=True)
class _Head:
    """manifest.json. `splits` are the numbers of shards in train, val and test; their columns follow one another.

    `digest` is that of all other fields: what was altered is found.
    """

    version: int
    classes: tuple[str, ...]
    num_classes: int
    label: str
    made_from: str
    own_val: bool
    holdout: bool
    identity: str
    splits: dict[str, int]
    columns: columns.Place
    digest: str = ""


def _digest(head: Mapping[str, Any]) -> str:
    fields = {key: value for key, value in head.items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _OldShard:
    """A shard in a manifest of version 1, all of which is JSON."""

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    labels: tuple[int, ...]
    crc32: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    def described(self, held: list[int]) -> Described:
        shard = Shard(self.name, self.samples, self.bytes, self.sha256, len(self.skipped), len(held))
        if not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME or not self.name.isprintable():
            raise Damaged(f"shard name {short(self.name)} leads out of the folder")
        if not 0 <= self.bytes <= columns.LARGEST_FILE or not _SHA256.fullmatch(self.sha256):
            raise Damaged(f"shard {short(self.name)} has {short(self.bytes)} bytes and SHA-256 {short(self.sha256)}")
        given = (self.offsets, self.labels, self.crc32, self.skipped, held)
        try:
            offsets, labels, crcs, skipped, out = (np.array(values, np.int64) for values in given)
        except OverflowError as error:
            raise Damaged(f"shard {short(self.name)} has a number that is too large") from error
        if self.samples != len(offsets):
            raise Damaged(f"shard {self.name} has {self.samples} samples and {len(offsets)} offsets")
        known = crcs if len(crcs) or not self.samples else None
        return shard, Rows(offsets, labels, known, skipped, out)


@dataclass(frozen=True)
class _Old:
    """A manifest of version 1; `holdout` are the (shard, sample) numbers of train that are val."""

    version: int
    classes: tuple[str, ...]
    num_classes: int
    label: str
    splits: dict[str, tuple[_OldShard, ...]]
    holdout: tuple[tuple[int, int], ...] | None
    made_from: str
    own_val: bool = True


def save(
    root: str, classes: Sequence[str], num_classes: int, label: str, splits: Mapping[str, Sequence[Described]],
    made_from: str, holdout: bool = False, own_val: bool = True,
) -> Manifest:  # fmt: skip
    """Write a manifest into `root`, manifest.json last, and return it as it is read again."""
    made = {split: columns.in_memory(splits[split]) for split in SPLITS if split in splits}
    place = columns.write(root, list(made.values()))
    held = held_out(made["train"]) if holdout else None
    identity = identity_of(made_from, label, num_classes, made, held)
    counts = {split: len(shards) for split, shards in made.items()}
    head = _Head(VERSION, tuple(classes), num_classes, label, made_from, own_val, holdout, identity, counts, place)
    before = _columns_of(root)
    fields = dataclasses.asdict(head)
    storage.write_json(storage.join(root, NAME), {**fields, "digest": _digest(fields)})
    _remove_older(root, place.file, before)
    return load_manifest(root)


def _remove_older(root: str, *keep: object) -> None:
    """Remove files of columns, but for those of a manifest and of the one before it, which a run may still read."""
    for file in storage.list_files(root):
        if _COLUMNS.fullmatch(file) and file not in keep:
            storage.remove(storage.join(root, file))


def _columns_of(root: str) -> object:
    """The file of columns that the manifest in `root` names, if there is one."""
    try:
        return storage.read_json(storage.join(root, NAME))["columns"]["file"]
    except (FileNotFoundError, UserError, KeyError, TypeError):
        return None


def copy(source: str, target: str) -> None:
    """Copy a manifest, manifest.json last."""
    file, before = _columns_of(source), _columns_of(target)
    if isinstance(file, str):
        storage.copy(storage.join(source, file), storage.join(target, file))
    storage.copy(storage.join(source, NAME), storage.join(target, NAME))
    _remove_older(target, file, before)


def load_manifest(root: str) -> Manifest:
    """Read and check `root`/manifest.json. Raises UserError with the remedy where it is missing or wrong."""
    url = storage.join(root, NAME)
    try:
        value = storage.read_json(url)
    except FileNotFoundError as error:
        raise UserError(
            f"'{url}' does not exist: make shards with `secateur shards build`, or describe shards made elsewhere "
            "with `secateur shards index`"
        ) from error
    version = value.get("version") if isinstance(value, dict) else None
    try:
        manifest = _old(value) if version == _OLD_VERSION else _new(root, value, version)
        problem = _inconsistency(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"'{'.'.join(map(str, first['loc']))}' ({first['msg']})"
    except Damaged as error:
        problem = str(error)
    if problem:
        raise UserError(f"'{url}' is damaged: {problem}: {_AGAIN}")
    return manifest


def _new(root: str, value: Any, version: object) -> Manifest:
    if isinstance(value, dict) and version != VERSION:
        raise UserError(
            f"'{storage.join(root, NAME)}' has version {short(version)}, this program reads {_OLD_VERSION} and "
            f"{VERSION}: {_AGAIN}"
        )
    head = TypeAdapter(_Head).validate_python(value)
    if head.digest != _digest(value):
        raise Damaged("it was altered after it was written")
    if not _COLUMNS.fullmatch(head.columns.file):
        raise Damaged(f"its columns are '{head.columns.file}', which is no name of such a file")
    if not head.splits.keys() <= set(SPLITS) or not all(0 <= count <= MOST_SHARDS for count in head.splits.values()):
        raise Damaged(f"splits are {short(head.splits)}")
    if not 0 < head.columns.name_bytes <= _LONGEST_NAME:
        raise Damaged(f"names of shards have {short(head.columns.name_bytes)} bytes")
    if not 0 <= head.columns.bytes <= columns.LARGEST_FILE:
        raise Damaged(f"its columns have {short(head.columns.bytes)} bytes")
    names = [split for split in SPLITS if split in head.splits]
    read = columns.read(root, head.columns, [head.splits[name] for name in names])
    splits = dict(zip(names, read, strict=True))
    return Manifest(
        head.classes, head.num_classes, head.label, splits, head.holdout, head.made_from, head.own_val, head.identity
    )


def _old(value: Any) -> Manifest:
    given = TypeAdapter(_Old).validate_python(value)
    if given.holdout is not None and "val" in given.splits:
        raise Damaged("there are both a val part and a holdout")
    held: dict[int, list[int]] = {}
    for shard, sample in given.holdout or ():
        held.setdefault(shard, []).append(sample)
    if given.holdout is not None and not held.keys() <= set(range(len(given.splits.get("train", ())))):
        raise Damaged("holdout names a shard that is not there")
    splits = {
        split: columns.in_memory(
            shard.described(sorted(held.get(number, ())) if split == "train" else [])
            for number, shard in enumerate(shards)
        )
        for split, shards in given.splits.items()
    }
    holdout = given.holdout is not None
    identity = identity_of(given.made_from, given.label, given.num_classes, splits, given.holdout)
    return Manifest(
        given.classes, given.num_classes, given.label, splits, holdout, given.made_from, given.own_val, identity
    )


def _inconsistency(manifest: Manifest) -> str | None:
    if not {"train", "test"} <= manifest.splits.keys() <= set(SPLITS):
        return f"splits are {short(sorted(manifest.splits))}"
    if not len(manifest.classes) <= manifest.num_classes <= MOST_CLASSES or manifest.num_classes < 1:
        return f"there are {len(manifest.classes)} names for {manifest.num_classes} classes"
    names: set[bytes] = set()
    for shards in manifest.splits.values():
        for name in shards.table["name"].tolist():
            if name in names:
                return f"shard {short(name.decode(errors='replace'))} is named twice"
            names.add(name)
            if not _is_name(name):
                return f"shard name {short(name)} leads out of the folder"
    for split, shards in manifest.splits.items():
        if not shards.used.sum():
            return f"{split} has no samples"
    held = {split: int(shards.held.sum()) for split, shards in manifest.splits.items()}
    if manifest.holdout == ("val" in manifest.splits):
        return f"there are {'both' if manifest.holdout else 'neither'} a val part and a holdout"
    if any(held[split] for split in held if split != "train" or not manifest.holdout):
        return "samples are held out where there is no holdout"
    if manifest.holdout and not 0 < held["train"] < int(manifest.splits["train"].used.sum()):
        return f"holdout names {held['train']} samples, none, or all of train"
    return None


def _is_name(name: bytes) -> bool:
    try:
        return bool(_NAME.fullmatch(name.decode()))
    except UnicodeDecodeError:
        return False


def parse_label(sample: Mapping[str, Any], label: str) -> int:
    """The label of a sample (member suffix -> bytes). Raises ValueError that says what is wrong."""
    if label == "cls":
        if "cls" not in sample:
            raise ValueError("has no .cls member")
        if not _INTEGER.fullmatch(sample["cls"]):
            raise ValueError(f"has the label {sample['cls'][:40]!r}, which is not an integer")
        number = int(sample["cls"])
    else:
        if "json" not in sample:
            raise ValueError("has no .json member")
        try:
            fields = json.loads(sample["json"])
        except (ValueError, RecursionError) as error:
            raise ValueError("has a .json member that is not valid JSON") from error
        if not isinstance(fields, dict) or label not in fields:
            raise ValueError(f"has no field '{label}' in its .json member")
        number = fields[label]
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"has the label {number!r}, which is not an integer")
    if number < 0:
        raise ValueError(f"has the label {number}, which is negative")
    if number > columns.LARGEST:
        raise ValueError(f"has the label {short(number)}, which is too large")
    return number
