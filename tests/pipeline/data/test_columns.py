"""A manifest's columns: what is written is read, whatever is harmed is found, and older manifests say the same."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import few_samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.data import columns, manifest
from pipeline.data.columns import Damaged, Described, Rows, Shard
from pipeline.data.manifest import Manifest, load_manifest

HASH = "ab" * 31 + "00"


def described(draw: st.DrawFn, name: str) -> Described:
    """A shard of up to 12 samples, of which some are not used and others held out."""
    samples = draw(st.integers(1, 12))
    steps = draw(st.lists(st.integers(1, 9), min_size=samples, max_size=samples))
    offsets = 512 * (np.cumsum(steps) - steps[0])
    labels = np.array(draw(st.lists(st.integers(0, 2**32 - 1), min_size=samples, max_size=samples)))
    kinds = np.array(draw(st.lists(st.sampled_from(["used", "skipped", "held"]), min_size=samples, max_size=samples)))
    skipped, held = np.flatnonzero(kinds == "skipped"), np.flatnonzero(kinds == "held")
    crcs = labels[::-1].copy() if draw(st.booleans()) else None
    rows = Rows(offsets, labels, crcs, skipped, held)
    return Shard(name, samples, int(offsets[-1]) + 1024, HASH, len(skipped), len(held)), rows


@st.composite
def splits(draw: st.DrawFn) -> list[list[Described]]:
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    return [
        [described(draw, f"{split}-ü{number}.tar") for number in range(count)] for split, count in enumerate(counts)
    ]


def same(one: Rows, two: Rows) -> bool:
    given = ((getattr(each, name) for name in ("offsets", "labels", "skipped", "held")) for each in (one, two))
    return all(map(np.array_equal, *given)) and np.array_equal(np.array(one.crc32), np.array(two.crc32))


@settings(max_examples=40)
@given(splits())
def test_what_is_written_is_read(given: list[list[Described]]) -> None:
    with tempfile.TemporaryDirectory() as root:
        place = columns.write(root, [columns.in_memory(split) for split in given])
        assert Path(root, place.file).stat().st_size == place.bytes
        found = columns.read(root, place, [len(split) for split in given])
        for split, shards in zip(given, found, strict=True):
            assert [*shards] == [shard for shard, _ in split]
            assert all(same(shards.rows(number), rows) for number, (_, rows) in enumerate(split))
            assert all(same(one, two) for one, (_, two) in zip(shards.all_rows(), split, strict=True))
            assert shards.used.tolist() == [shard.used for shard, _ in split]
            assert shards.held.tolist() == [shard.held for shard, _ in split]


@pytest.fixture
def saved(tmp_path: Path) -> Manifest:
    """Two shards of train, one of whose samples is not used and one held out, and one of test."""
    rows = Rows(np.array([0, 1024, 2048]), np.array([1, 0, 2]), np.array([7, 0, 9]), np.array([1]), np.array([2]))
    plain = Rows(np.array([512]), np.array([1]))
    train = [(Shard("train-0.tar", 3, 4096, HASH, 1, 1), rows), (Shard("train-1.tar", 1, 1024, HASH), plain)]
    test = [(Shard("test-0.tar", 1, 1024, HASH), plain)]
    return manifest.save(str(tmp_path), ["a", "b"], 3, "cls", {"train": train, "test": test}, "made", holdout=True)


def test_the_table_and_the_sizes_by_hand(saved: Manifest) -> None:
    assert saved.sizes == {"train": 2, "val": 1, "test": 1}
    assert saved.splits["train"].table["lowest"].tolist() == [1, 1]  # the label of the skipped sample does not count
    assert saved.splits["train"].table["highest"].tolist() == [2, 1]
    assert manifest.held_out(saved.splits["train"]) == [(0, 2)]
    assert [shard.name for shard in saved.shards] == ["train-0.tar", "train-1.tar", "test-0.tar"]


def test_a_manifest_of_version_1_says_the_same(saved: Manifest, tmp_path: Path) -> None:
    tree = few_samples.version_1(saved)
    for shard in (shard for shards in tree["splits"].values() for shard in shards if shard["crc32"] is None):
        del shard["crc32"]
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    older = load_manifest(str(tmp_path))
    assert older.identity == saved.identity == "caa37b6344515873"  # as the program of then gave it
    assert older.sizes == saved.sizes
    for split, shards in saved.splits.items():
        assert [*older.splits[split]] == [*shards]
        assert all(same(older.splits[split].rows(number), shards.rows(number)) for number in range(len(shards)))


def test_what_is_written_again_leaves_the_columns_before_to_runs_that_read_them(
    saved: Manifest, tmp_path: Path
) -> None:
    few_samples.rewrite(tmp_path, saved, label="other")
    [before] = tmp_path.glob("*.columns")
    for number in (3, 2, 1):
        test = [(Shard(f"test-{number}.tar", 1, 2048, HASH), Rows(*few()))]
        few_samples.rewrite(tmp_path, load_manifest(str(tmp_path)), splits={"test": test})
        assert len([*tmp_path.glob("*.columns")]) == 2
    assert not before.exists()
    assert load_manifest(str(tmp_path)).splits["test"][0].name == "test-1.tar"


def few() -> tuple[columns.Numbers, columns.Numbers]:
    return np.array([0]), np.array([0])


@pytest.mark.parametrize("file", ["manifest.json", "columns"])
def test_every_byte_counts(file: str, saved: Manifest, tmp_path: Path) -> None:
    """Changed, it is found: at once, or where it concerns the rows of a shard when they are read."""
    path = next(tmp_path.glob("*.columns")) if file == "columns" else tmp_path / file
    whole, chance = path.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"manifest"):
            read_all(tmp_path)
    path.write_bytes(whole)
    read_all(tmp_path)
    for end in range(len(whole.rstrip(b"\n"))):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"manifest"):
            read_all(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"manifest"):
        read_all(tmp_path)


def read_all(root: Path) -> None:
    for shards in load_manifest(str(root)).splits.values():
        for number in range(len(shards)):
            shards.rows(number)


GOOD = Rows(np.array([0, 1024]), np.array([0, 1]), np.array([5, 6]), np.array([0]), np.array([1]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"labels": np.array([0])}, "2 offsets, 1 labels"),
        ({"crc32": np.array([0])}, "1 CRCs"),
        ({"offsets": np.array([1024, 0])}, "do not rise"),
        ({"offsets": np.array([0, 2048])}, "outside of its 2048 bytes"),
        ({"offsets": np.array([0, 1000])}, "between tar blocks"),
        ({"labels": np.array([0, 2**32])}, r"outside of 0\.\."),
        ({"labels": np.array([-1, 0])}, r"outside of 0\.\."),
        ({"skipped": np.array([2])}, "skips samples that are not there"),
        ({"skipped": np.array([0, 0])}, "skips samples"),
        ({"held": np.array([-1])}, "holds out samples that are not there"),
        ({"held": np.array([0])}, "holds out samples that it skips"),
    ],
)
def test_rows_that_contradict_themselves(change: dict[str, columns.Numbers], problem: str) -> None:
    columns.in_memory([(Shard("x.tar", 2, 2048, HASH, 1, 1), GOOD)])
    with pytest.raises(Damaged, match=rf"shard x\.tar .*{problem}"):
        columns.in_memory([(Shard("x.tar", 2, 2048, HASH, 1, 1), replace(GOOD, **change))])
