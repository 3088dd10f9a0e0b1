"""manifest.json: the contents of the shards beside it, so that any sample can be read without a search."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data.parts import SPLITS

NAME = "manifest.json"
VERSION = 1
IMAGES = ("jpg", "jpeg", "png")
_INTEGER = re.compile(rb"\s*[+-]?[0-9]{1,18}\s*")
_LARGEST = 2**53  # of any number in a manifest; a larger one is damage
MOST_CLASSES = 10**6
_NAME = re.compile(r"[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]*")  # a file beside the manifest, not a hidden one


@dataclass(frozen=True)
class Shard:
    """One tar: `offsets[i]` is the byte at which sample i's first header starts, `labels[i]` its class.

    `crc32[i]` is the CRC-32 of its stored image; older manifests lack it. `skipped` are the numbers of samples that are
    not used, rising; their labels and CRCs are 0.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    offsets: tuple[int, ...]
    labels: tuple[int, ...]
    crc32: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @property
    def used(self) -> int:
        """How many samples are used."""
        return self.samples - len(self.skipped)


@dataclass(frozen=True)
class Manifest:
    """The shards of a data set.

    `num_classes` is the size of the label space. `label` is where a sample keeps its label (cls, or a
    field of its json). `holdout` is set only where no val shards exist: the (shard, sample) numbers of
    train that are val. `made_from` is a hash of what the shards were made from. `own_val` is false where the val shards
    were drawn from the source's train part when they were built; older manifests do not say.
    """

    version: int
    classes: tuple[str, ...]
    num_classes: int
    label: str
    splits: dict[str, tuple[Shard, ...]]
    holdout: tuple[tuple[int, int], ...] | None
    made_from: str
    own_val: bool = True

    @property
    def identity(self) -> str:
        """A short hash of what the shards hold: their checksums in order, and which samples are used as what."""
        shards = {split: [(s.name, s.sha256, s.skipped) for s in parts] for split, parts in self.splits.items()}
        facts = [self.made_from, self.label, self.num_classes, self.holdout, shards]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples train, val and test have, those held out of train counted as val."""
        stored = {split: sum(shard.used for shard in self.splits.get(split, ())) for split in SPLITS}
        held = len(self.holdout or ())
        return {**stored, "train": stored["train"] - held, "val": stored["val"] + held}

    @property
    def val_is_cut_from_train(self) -> bool:
        """Whether val was drawn from what the source calls train."""
        return self.holdout is not None or not self.own_val

    def save(self, root: str) -> None:
        """Write manifest.json into `root`, one line a shard."""
        fields = dataclasses.asdict(self)
        splits = fields.pop("splits")
        for shard in (shard for shards in splits.values() for shard in shards if not shard["skipped"]):
            del shard["skipped"]  # as older manifests are
        lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in fields.items()]
        blocks = [
            f"  {json.dumps(split)}: [\n" + ",\n".join(f"   {json.dumps(shard)}" for shard in shards) + "\n  ]"
            for split, shards in splits.items()
        ]
        text = "{\n" + "\n".join(lines) + '\n "splits": {\n' + ",\n".join(blocks) + "\n }\n}\n"
        storage.write_bytes(storage.join(root, NAME), text.encode())


def load_manifest(root: str) -> Manifest:
    """Read and check `root`/manifest.json. Raises UserError with the remedy where it is missing or wrong."""
    url = storage.join(root, NAME)
    again = "run `secateur shards index` (or `shards build`) again"
    try:
        value = storage.read_json(url)
    except FileNotFoundError as error:
        raise UserError(
            f"'{url}' does not exist: make shards with `secateur shards build`, or describe shards made elsewhere "
            "with `secateur shards index`"
        ) from error
    if isinstance(value, dict) and value.get("version") != VERSION:
        raise UserError(f"'{url}' has version {value.get('version')!r}, this program reads {VERSION}: {again}")
    try:
        manifest = TypeAdapter(Manifest).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"'{url}' is damaged at '{where}' ({first['msg']}): {again}") from error
    problem = _inconsistency(manifest)
    if problem:
        raise UserError(f"'{url}' is damaged: {problem}: {again}")
    return manifest


def _inconsistency(manifest: Manifest) -> str | None:
    if not {"train", "test"} <= manifest.splits.keys() <= set(SPLITS):
        return f"splits are {sorted(manifest.splits)}"
    if not len(manifest.classes) <= manifest.num_classes <= MOST_CLASSES or manifest.num_classes < 1:
        return f"there are {len(manifest.classes)} names for {manifest.num_classes} classes"
    names: set[str] = set()
    for shard in (shard for shards in manifest.splits.values() for shard in shards):
        if shard.name in names:
            return f"shard {shard.name} is named twice"
        names.add(shard.name)
        problem = _shard_problem(shard)
        if problem:
            return problem
    for split, shards in manifest.splits.items():
        if not sum(shard.used for shard in shards):
            return f"{split} has no samples"
    return _holdout_problem(manifest)


def _shard_problem(shard: Shard) -> str | None:
    if not _NAME.fullmatch(shard.name):
        return f"shard name {shard.name!r} leads out of the folder"
    if not shard.samples == len(shard.offsets) == len(shard.labels) or len(shard.crc32) not in (0, shard.samples):
        counts = f"{shard.samples} samples, {len(shard.offsets)} offsets, {len(shard.labels)} labels"
        return f"shard {shard.name} has {counts}, {len(shard.crc32)} CRCs"
    if list(shard.offsets) != sorted(set(shard.offsets)) or not 0 <= shard.bytes <= _LARGEST:
        return f"shard {shard.name} has offsets that do not rise"
    if shard.offsets and not 0 <= shard.offsets[0] <= shard.offsets[-1] < shard.bytes:
        return f"shard {shard.name} has offsets outside of its {shard.bytes} bytes"
    if list(shard.skipped) != sorted(set(shard.skipped)) or not set(shard.skipped) <= set(range(shard.samples)):
        return f"shard {shard.name} skips samples that are not there"
    if shard.labels and not 0 <= min(shard.labels) <= max(shard.labels) <= _LARGEST:
        return f"shard {shard.name} has labels from {min(shard.labels)} to {max(shard.labels)}"
    return None


def _holdout_problem(manifest: Manifest) -> str | None:
    if manifest.holdout is None:
        return None if "val" in manifest.splits else "there is neither a val part nor a holdout"
    if "val" in manifest.splits:
        return "there are both a val part and a holdout"
    train = manifest.splits["train"]
    skipped = [set(shard.skipped) for shard in train]
    for shard_number, sample in manifest.holdout:
        there = 0 <= shard_number < len(train) and 0 <= sample < train[shard_number].samples
        if not there or sample in skipped[shard_number]:
            return f"holdout names sample {sample} of shard {shard_number}, which is not there"
    if not 0 < len(set(manifest.holdout)) == len(manifest.holdout) < sum(shard.used for shard in train):
        return f"holdout names {len(manifest.holdout)} samples, some twice, none, or all of train"
    return None


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
    return number
