"""Build, describe and check WebDataset shards.

A data set is a folder of ordinary tars (`key.jpg|png` + `key.cls`) and a manifest.json, written last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.seeding import generator
from pipeline.base.spread import Spread, here
from pipeline.data import decoder, placement, writer
from pipeline.data import sources as sources_module
from pipeline.data.columns import Described, Shard
from pipeline.data.describe import Bad, scan_shard, sorted_warnings, told
from pipeline.data.manifest import IMAGES, MOST_CLASSES, NAME, Manifest, load_manifest, save
from pipeline.data.parts import SPLITS, Part, Source
from pipeline.data.stream import read_members
from pipeline.data.writer import Order, Sample
from pipeline.settings.data import Data

__all__ = ["Manifest", "Shard", "build", "index", "load_manifest", "verify"]

Progress = Callable[[str, int, int], None]

_PARTIAL = "manifest.partial.json"
_SAVE_S = 5.0  # seconds between two notes of what a build has finished
_BYTES_VERSION = 1  # of what `build` writes into a tar; another one makes other shards


def build(config: Data, seed: int, root: str, progress: Progress | None = None, spread: Spread = here) -> Manifest:
    """Write the shards of a source into `root` and return their manifest.

    val is the source's own, or drawn from train by seed, each class in proportion; every split is shuffled over all its
    shards. Finished shards are kept when a killed build is run again, and the bytes come out the same, wherever
    `spread` has them written. Raises UserError where the source is wrong or `root` holds shards of something else.
    """
    return build_from(sources_module.open_source(config, seed), config, seed, root, progress, spread)


def build_from(
    source: Source, config: Data, seed: int, root: str, progress: Progress | None = None, spread: Spread = here
) -> Manifest:
    """As `build`, of a source that is open already."""
    made_from = identity(config, seed, source)
    if storage.exists(storage.join(root, NAME)):
        manifest = load_manifest(root)
        if manifest.made_from != made_from:
            raise _other(root, NAME)
        return manifest
    storage.remove_leftovers(root)
    done = _load_partial(root, made_from)
    planned = [*_planned(root, config.shard_samples, seed, _split(config, seed, source))]
    partial, saved = {"made_from": made_from, "shards": done}, time.monotonic()
    splits: dict[str, list[Described]] = {split: [] for split in dict.fromkeys(plan.split for plan in planned)}
    try:
        orders = (plan.with_items(done.get(plan.name)) for plan in planned)
        with contextlib.closing(spread(writer.made, orders, len(planned))) as made:
            for written, (plan, described) in enumerate(zip(planned, made, strict=True), 1):
                splits[plan.split].append(described)
                if done.get(plan.name) != described[0].sha256:
                    done[plan.name] = described[0].sha256
                    if time.monotonic() - saved > _SAVE_S:
                        storage.write_json(storage.join(root, _PARTIAL), partial)
                        saved = time.monotonic()
                if progress:
                    progress(f"shard {plan.name}", written, len(planned))
    except BaseException:
        with contextlib.suppress(Exception):  # the error that ends the build is the one to be told
            storage.write_json(storage.join(root, _PARTIAL), partial)
        raise
    own_val = source.val is not None
    manifest = save(root, source.classes, source.num_classes, "cls", splits, made_from, own_val=own_val)
    storage.remove(storage.join(root, _PARTIAL))
    return manifest


class _Plan(NamedTuple):
    """Which samples of a part a shard holds, in their order."""

    root: str
    split: str
    name: str
    part: Part
    numbers: NDArray[np.int64]

    def with_items(self, sha256: str | None) -> Order:
        """What another process needs in order to write it."""
        part = self.part
        return Order(
            self.root,
            self.name,
            sha256,
            [
                Sample(number, part.names[number], int(part.labels[number]), part.item(number))
                for number in self.numbers.tolist()
            ],
        )


def _planned(
    root: str, shard_samples: int, seed: int, parts: dict[str, tuple[Part, NDArray[np.int64]]]
) -> Iterator[_Plan]:
    """The shards of each split, whose samples are shuffled over all of them."""
    for split, (part, numbers) in parts.items():
        order = generator(seed, "order", split).permutation(numbers)
        for start in range(0, len(order), shard_samples):
            name = f"{split}-{start // shard_samples:05d}.tar"
            yield _Plan(root, split, name, part, order[start : start + shard_samples])


def identity(config: Data, seed: int, source: Source) -> str:
    """What decides the bytes of a source's shards, as one SHA-256."""
    facts: dict[str, Any] = {
        "source": source.fingerprint,
        "classes": source.classes,
        "num_classes": source.num_classes,
        "train": hashlib.sha256(source.train.labels.tobytes()).hexdigest(),
        "test": hashlib.sha256(source.test.labels.tobytes()).hexdigest(),
        "val_fraction": config.val_fraction,
        "shard_samples": config.shard_samples,
        "seed": seed,
        "version": _BYTES_VERSION,
    }
    if source.val is not None:
        facts["val"] = hashlib.sha256(source.val.labels.tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _other(root: str, name: str) -> UserError:
    return UserError(
        f"'{storage.join(root, name)}' belongs to shards made from other data or settings (source, seed, "
        "val_fraction, test_fraction, shard_samples, classes): choose another folder, or delete this one"
    )


def _load_partial(root: str, made_from: str) -> dict[str, str]:
    """Names and hashes of the shards that an earlier, equal build has finished."""
    url = storage.join(root, _PARTIAL)
    if not storage.exists(url):
        return {}
    partial = storage.read_json(url)
    if partial["made_from"] != made_from:
        raise _other(root, _PARTIAL)
    return dict(partial["shards"])


def _split(config: Data, seed: int, source: Source) -> dict[str, tuple[Part, NDArray[np.int64]]]:
    """For each split, the part it is taken from and the sample numbers in that part."""
    labels, test = source.train.labels, (source.test, np.arange(len(source.test.labels)))
    if source.val is not None:
        parts = {"train": source.train, "val": source.val}
        return {**{split: (part, np.arange(len(part.labels))) for split, part in parts.items()}, "test": test}
    val = draw_val(labels, config.val_fraction, seed)
    train = np.setdiff1d(np.arange(len(labels)), val)
    return {"train": (source.train, train), "val": (source.train, val), "test": test}


def draw_val(labels: NDArray[np.int64], val_fraction: float, seed: int) -> NDArray[np.int64]:
    """Sorted numbers of the samples held out of train. UserError if either side would be empty."""
    total = round(val_fraction * len(labels))
    if not 0 < total < len(labels):
        raise UserError(
            f"data.val_fraction={val_fraction} of {len(labels)} train samples leaves {len(labels) - total} to train "
            f"on and {total} for val: change it, or add data"
        )
    return placement.stratified(labels, total, generator(seed, "val"))


def index(
    root: str,
    label: str = "cls",
    val_fraction: float = 0.1,
    seed: int = 0,
    num_classes: int | None = None,
    progress: Progress | None = None,
    skip_bad: bool = False,
    spread: Spread = here,
) -> tuple[Manifest, list[str]]:
    """Describe shards made elsewhere: write manifest.json and return it, with warnings.

    Shards are files train*.tar, val*.tar and test*.tar in `root`. Without test shards, val counts as
    test (ILSVRC's habit) and val is held out of train by seed; without val shards too. Warns of shards
    sorted by class, whose batches would be poorly mixed. Raises UserError naming shard and key. With `skip_bad`,
    samples without label or image, and images that cannot be decoded, are left out; the warnings say how many.
    """
    names = storage.list_files(root)
    found = {split: [n for n in names if n.startswith(split) and n.endswith(".tar")] for split in SPLITS}
    packed = [n for n in names if n.startswith(SPLITS) and re.search(r"\.(tgz|tar\.\w+)$", n)]
    if packed:
        raise UserError(f"'{storage.join(root, packed[0])}' is compressed: shards must be plain tars, unpack it first")
    if not found["test"]:
        found["test"], found["val"] = found["val"], []
    for split in ("train", "test"):
        if not found[split]:
            wanted = "train*.tar" if split == "train" else "test*.tar or val*.tar"
            raise UserError(f"'{root}' has no {wanted}: name shards after the part they belong to")
    names = [name for split in SPLITS for name in found[split]]
    scan = functools.partial(_scanned, root, label, num_classes, skip_bad)
    splits: dict[str, list[Described]] = {split: [] for split in SPLITS if found[split]}
    bad: list[Bad] = []
    of_split = {name: split for split in SPLITS for name in found[split]}
    with contextlib.closing(spread(scan, names, len(names))) as scanned:
        for done, (name, (described, left_out)) in enumerate(zip(names, scanned, strict=True), 1):
            splits[of_split[name]].append(described)
            bad += left_out
            if progress:
                progress(f"shard {name}", done, len(names))
    for split, each in splits.items():
        if not any(shard.used for shard, _ in each):
            raise UserError(f"'{root}': none of the samples of {split} can be used; the first: {bad[0].what}")
    every = [each for described in splits.values() for each in described]
    classes = num_classes or 1 + max(int(rows.labels.max()) for _, rows in every)
    if classes > MOST_CLASSES:
        raise UserError(
            f"'{root}' has the label {classes - 1}, and labels count classes from 0 (at most {MOST_CLASSES - 1}): "
            "write class numbers into the shards in place of ids such as WordNet's"
        )
    holdout = "val" not in splits
    held = None
    if holdout:
        splits["train"] = _hold_out(splits["train"], val_fraction, seed)
        held = [(number, sample) for number, (_, rows) in enumerate(splits["train"]) for sample in rows.held.tolist()]
    facts: list[Any] = [label, classes, held, [[shard.name, shard.sha256] for shard, _ in every]]
    facts += [[rows.skipped.tolist() for _, rows in every]] if bad else []
    made_from = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    manifest = save(root, tuple(map(str, range(classes))), classes, label, splits, made_from, holdout)
    notes = told(bad, sum(shard.samples for shard, _ in every))
    return manifest, [*notes, *(w for described in splits.values() for w in sorted_warnings(root, described))]


def _scanned(root: str, label: str, num_classes: int | None, skip_bad: bool, name: str) -> tuple[Described, list[Bad]]:
    """A shard, and the samples of it that are left out."""
    bad: list[Bad] = []
    return scan_shard(root, name, label, num_classes, bad if skip_bad else None), bad


def _hold_out(train: list[Described], val_fraction: float, seed: int) -> list[Described]:
    """The shards of train, of which so many samples are val."""
    used = [np.setdiff1d(np.arange(shard.samples), rows.skipped) for shard, rows in train]
    labels = np.concatenate([rows.labels[numbers] for (_, rows), numbers in zip(train, used, strict=True)])
    drawn = np.zeros(len(labels), np.bool_)
    drawn[draw_val(labels, val_fraction, seed)] = True
    parts = np.split(drawn, np.cumsum([len(numbers) for numbers in used])[:-1])
    return [
        (shard._replace(held=int(part.sum())), replace(rows, held=numbers[part]))
        for (shard, rows), numbers, part in zip(train, used, parts, strict=True)
    ]


def verify(root: str, progress: Progress | None = None, spread: Spread = here) -> list[str]:
    """Read every shard against the manifest and decode every image; one line for each problem found.

    Raises UserError where the manifest itself is missing or damaged.
    """
    manifest = load_manifest(root)
    splits = [manifest.splits[split] for split in SPLITS if split in manifest.splits]
    described = (each for split in splits for each in split.described())
    names, problems = [shard.name for shard in manifest.shards], list[str]()
    check = functools.partial(_verify_shard, root, manifest.label, manifest.num_classes)
    with contextlib.closing(spread(check, described, len(names))) as checked:
        for done, (name, found) in enumerate(zip(names, checked, strict=True), 1):
            problems += found
            if progress:
                progress(f"shard {name}", done, len(names))
    return problems


def _verify_shard(root: str, label: str, num_classes: int, described: Described) -> list[str]:
    shard, rows = described
    url = storage.join(root, shard.name)
    known = storage.stat(url)
    if known is None:
        return [f"shard '{url}' is missing"]
    problems = []
    if known.bytes != shard.bytes:
        problems.append(f"shard '{url}' has {known.bytes} bytes, the manifest says {shard.bytes}")
    try:
        skipped = list[Bad]() if shard.skipped else None
        found, _ = scan_shard(root, shard.name, label, num_classes, skipped)
    except UserError as error:
        return [*problems, str(error)]
    if not problems and found.sha256 != shard.sha256:
        problems.append(f"shard '{url}' has another SHA-256 than the manifest says")
    if found.samples != shard.samples:
        problems.append(f"shard '{url}' holds {found.samples} samples, the manifest says {shard.samples}")
    bad, known_bad = [], set(rows.skipped.tolist())
    for number, sample in enumerate(read_members([(url, 0, None)])):
        if number in known_bad:
            continue
        try:
            decoder.decode(next(sample[suffix] for suffix in IMAGES if suffix in sample), 3)
        except decoder.BadImage:
            bad.append(sample["__key__"])
    if bad:
        more = ", ..." if len(bad) > 5 else ""
        problems.append(f"shard '{url}' has {len(bad)} unreadable image(s): {', '.join(bad[:5])}{more}")
    return problems
