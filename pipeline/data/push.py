"""Shards to S3: each is checked as it is sent, shards that are there already are skipped, and the manifest is last."""

from __future__ import annotations

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import manifest as manifests
from pipeline.data.columns import Shard
from pipeline.data.manifest import NAME, load_manifest
from pipeline.data.shards import Progress
from pipeline.data.stream import ordered_map

_AT_ONCE = 4  # shards sent at a time


def push(source: str, target: str, progress: Progress | None = None) -> tuple[int, int]:
    """Copy the shards of `source` to `target` on S3. Returns how many were sent, and how many were there already.

    May be stopped and run again. Raises UserError where `target` is not on S3 or holds other shards, or a shard is not
    what the manifest says.
    """
    if not storage.is_s3(target):
        raise UserError(f"'{target}' is not on S3: give s3://bucket/prefix")
    manifest = load_manifest(source)
    if storage.exists(storage.join(target, NAME)) and load_manifest(target).made_from != manifest.made_from:
        raise UserError(
            f"'{storage.join(target, NAME)}' belongs to other shards: choose another prefix, or delete those there"
        )
    storage.remove_leftovers(target)
    shards = manifest.shards
    sent = 0

    def send(shard: Shard) -> bool:
        there = storage.stat(storage.join(target, shard.name))
        if there is not None and (there.bytes, there.sha256) == (shard.bytes, shard.sha256):
            return False
        storage.copy(storage.join(source, shard.name), storage.join(target, shard.name), shard.sha256)
        return True

    for done, was_sent in enumerate(ordered_map(send, shards, threads=_AT_ONCE, ahead=_AT_ONCE), 1):
        sent += was_sent
        if progress:
            progress(f"shard {shards[done - 1].name}", done, len(shards))
    manifests.copy(source, target)
    return sent, len(shards) - sent
