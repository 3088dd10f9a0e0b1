"""A session on a handful of images whose pixels a test gives, so that what comes of them can be worked out by hand."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny_run import ALONE, TINY, merged

from pipeline.data import columns, shards
from pipeline.data import manifest as manifests
from pipeline.data.columns import Rows, Shard
from pipeline.data.manifest import Manifest
from pipeline.run.events import Progress, unheard
from pipeline.run.state import Run
from pipeline.settings.config import Config, parse_config
from pipeline.train.session import Session, open_session

Pixels = list[list[int]]  # rows of 0..255; [] is an image that cannot be read
Sample = tuple[Pixels, int]  # and its label


def run_in(folder: Path) -> Run:
    """A run in an empty folder, which its writer holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lease.json").write_text('{"fence": 1, "pid": 1, "host": "h"}', encoding="utf-8")
    return Run(str(folder), 1)


def write_shard(path: Path, samples: Sequence[Sample]) -> None:
    """A shard of grey images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (pixels, label) in enumerate(samples):
            image = io.BytesIO()
            if pixels:
                Image.fromarray(np.array(pixels, np.uint8)).save(image, "PNG")
            for ending, data in (("png", image.getvalue() or b"no image"), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def holding_out(manifest: Manifest, *samples: tuple[int, int]) -> Manifest:
    """The manifest with these (shard, sample) numbers of train as val, and no val shards."""
    train = []
    for number, (shard, rows) in enumerate(manifest.splits["train"].described()):
        held = np.array(sorted(sample for where, sample in samples if where == number), np.int64)
        train.append((shard._replace(held=len(held)), replace(rows, held=held)))
    splits = {"train": columns.in_memory(train), "test": manifest.splits["test"]}
    return replace(manifest, splits=splits, holdout=True)


def rewrite(root: Path, manifest: Manifest, **changes: Any) -> Manifest:
    """Write a manifest anew with some of its fields changed, or `splits` of its (described) splits."""
    given: dict[str, Any] = {field.name: getattr(manifest, field.name) for field in fields(manifest)}
    given["splits"] = {split: [*parts.described()] for split, parts in manifest.splits.items()}
    given["splits"].update(changes.pop("splits", {}))
    del given["identity"]
    return manifests.save(str(root), **{**given, **changes})


def version_1(manifest: Manifest) -> dict[str, Any]:
    """manifest.json as it was before it had columns."""
    held = manifests.held_out(manifest.splits["train"]) if manifest.holdout else None

    def shard(shard: Shard, rows: Rows) -> dict[str, Any]:
        lists = {
            "offsets": rows.offsets.tolist(),
            "labels": rows.labels.tolist(),
            "crc32": np.array(rows.crc32).tolist(),
        }
        skipped = {"skipped": rows.skipped.tolist()} if shard.skipped else {}
        plain = {"name": shard.name, "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256}
        return {**plain, **lists, **skipped}

    return {
        "version": 1, "classes": list(manifest.classes), "num_classes": manifest.num_classes, "label": manifest.label,
        "holdout": held, "made_from": manifest.made_from, "own_val": manifest.own_val,
        "splits": {split: [shard(*each) for each in parts.described()] for split, parts in manifest.splits.items()},
    }  # fmt: skip


def config_on(folder: Path, size: int, **changes: Any) -> Config:
    """The config of a run on the shards in `folder`: images of size x size as they are, in one lane, all of them."""
    plain: dict[str, Any] = {
        "source": "shards", "root": str(folder), "size": size, "lanes": 1, "max_bad_fraction": 1.0,
    }  # fmt: skip
    base = {**TINY, "runs_dir": str(folder / "runs"), "data": plain}
    fixed = {"prune.allocation": "uniform", "dense.batch_size": 2, "retrain.batch_size": 2}
    return parse_config(merged(base, {**fixed, **changes}))


def session_on(
    folder: Path, samples: Sequence[Sample], classes: int, progress: Progress = unheard, **changes: Any
) -> Session:
    """A session whose train, val and test are these samples, in this order."""
    for split in ("train", "val", "test"):
        write_shard(folder / f"{split}-0.tar", samples)
    shards.index(str(folder), num_classes=classes)
    size = max(len(pixels) for pixels, _ in samples)
    config = config_on(folder, size, **changes)
    return open_session(config, ALONE, run_in(folder / "runs/tiny"), progress)
