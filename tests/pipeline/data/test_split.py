"""A split of a few images: which samples it has, where they lie, and that memory and shards give the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import few_samples
import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.data import loader, shards
from pipeline.data.manifest import Manifest
from pipeline.data.split import Batch, Split
from pipeline.data.stream import Raw

# Image i is one pixel of brightness 10 i. Shard 0 has images 0, 1, 2 and shard 1 has 3, 4; image 4 cannot be read.
SHARDS = [[([[0]], 0), ([[10]], 1), ([[20]], 2)], [([[30]], 0), ([], 1)]]
TEST = [([[90]], 2), ([[100]], 0)]


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, Manifest]:
    """Shards without val, of which sample 1 of shard 0 and sample 0 of shard 1 are held out as val."""
    for number, samples in enumerate(SHARDS):
        few_samples.write_shard(tmp_path / f"train-{number}.tar", samples)
    few_samples.write_shard(tmp_path / "test-0.tar", TEST)
    manifest, _ = shards.index(str(tmp_path), val_fraction=0.4, num_classes=3)
    assert manifest.holdout
    assert manifest.sizes["val"] == 2  # 0.4 of 5
    return str(tmp_path), few_samples.holding_out(manifest, (1, 0), (0, 1))


def split_of(made: tuple[str, Manifest], name: str, **data: Any) -> Split:
    config = few_samples.config_on(Path(made[0]), 1, **{f"data.{key}": value for key, value in data.items()})
    return loader.open_split(config.data, *made, name)


def test_what_is_held_out_is_val_and_the_rest_train(made: tuple[str, Manifest]) -> None:
    train, val, test = (split_of(made, name) for name in ("train", "val", "test"))
    assert [len(split) for split in (train, val, test)] == [3, 2, 2]
    assert train.labels.tolist() == [0, 2, 1]  # images 0, 2, 4
    assert val.labels.tolist() == [1, 0]  # images 1 and 3, in the order of the shards
    assert test.labels.tolist() == [2, 0]
    assert [split.counts.tolist() for split in (train, val, test)] == [[2, 1], [1, 1], [2]]


def test_a_val_of_its_own_leaves_train_whole(made: tuple[str, Manifest]) -> None:
    root, manifest = made
    whole = few_samples.holding_out(manifest)
    stored = (root, replace(whole, splits={**whole.splits, "val": manifest.splits["test"]}, holdout=False))
    assert split_of(stored, "train").labels.tolist() == [0, 1, 2, 0, 1]
    assert split_of(stored, "val").labels.tolist() == [2, 0]


def test_an_empty_holdout_of_a_shard(made: tuple[str, Manifest]) -> None:
    root, manifest = made
    val = split_of((root, few_samples.holding_out(manifest, (1, 1))), "val")
    assert (val.labels.tolist(), val.counts.tolist()) == ([1], [0, 1])
    train = split_of((root, few_samples.holding_out(manifest, (1, 0), (1, 1))), "train")
    assert train.counts.tolist() == [3, 0]


def brightness(raws: Iterator[Raw], split: Split) -> list[int | None]:
    canvases = [split.canvas(raw) for raw in raws]
    return [None if canvas is None else int(canvas[0, 0, 0]) for canvas in canvases]


def test_samples_are_read_by_their_number_in_the_split(made: tuple[str, Manifest]) -> None:
    train, val = split_of(made, "train"), split_of(made, "val")
    assert brightness(train.read(np.array([0, 1, 2])), train) == [0, 20, None]
    assert brightness(val.read(np.array([1, 0, 1])), val) == [30, 10, 30]
    assert brightness(val.read(np.array([0, 1]), np.array([1, 0])), val) == [30, 10]  # input i is output places[i]
    assert [*val.read(np.array([], np.int64))] == []


def test_pieces_break_at_another_shard_and_at_a_step_back(made: tuple[str, Manifest]) -> None:
    train = split_of((made[0], few_samples.holding_out(made[1])), "train")

    def pieces(*numbers: int) -> list[tuple[str, list[int]]]:
        found = train._pieces(np.array(numbers, np.int64))
        return [(Path(piece.url).name, piece.wanted.tolist()) for piece in found]

    assert pieces(0, 1, 2, 3, 4) == [("train-0.tar", [0, 1, 2]), ("train-1.tar", [0, 1])]
    assert pieces(0, 2) == [("train-0.tar", [0, 2])]  # a short gap is read over
    assert pieces(2, 0, 1) == [("train-0.tar", [2]), ("train-0.tar", [0, 1])]
    assert pieces(1, 1) == [("train-0.tar", [1])] * 2
    assert pieces() == []


def as_lists(batches: Iterator[Batch]) -> list[dict[str, list[Any]]]:
    return [
        {"pixels": b.images.flatten().tolist(), "labels": b.labels.tolist(), "weights": b.weights.tolist(),
         "indices": b.indices.tolist()}
        for b in batches
    ]  # fmt: skip


@pytest.mark.parametrize("cache_bytes", [0, 2, 3, 10**6])
def test_batches_by_hand_from_memory_and_from_shards(made: tuple[str, Manifest], cache_bytes: int) -> None:
    """Train's three images of a byte each fit into 3 bytes. The one that cannot be read is black and weighs nothing."""
    train = split_of(made, "train", cache_bytes=cache_bytes, eval_batch=2)
    assert train.load() == (cache_bytes >= 3)
    assert train.gathers == (cache_bytes >= 3)
    assert as_lists(loader.EvalLoader(train, train.config).batches(0, 1)) == [
        {"pixels": [0, 20], "labels": [0, 2], "weights": [1.0, 1.0], "indices": [0, 1]},
        {"pixels": [0], "labels": [1], "weights": [0.0], "indices": [2]},
    ]
    assert [Path(key).parts[-2:] for key in train.bad] == [("train-1.tar", "001")]


@pytest.mark.parametrize("cache_bytes", [0, 10**6])
def test_a_flip_is_the_same_from_memory_and_from_shards(tmp_path: Path, cache_bytes: int) -> None:
    """Training images (1, 2) are turned by chance and by sample; evaluation has them as they are."""
    samples = [([[1, 2], [1, 2]], 0)] * 16
    few_samples.write_shard(tmp_path / "train-0.tar", samples)
    few_samples.write_shard(tmp_path / "test-0.tar", samples[:1])
    manifest, _ = shards.index(str(tmp_path), val_fraction=0.1, num_classes=1)
    config = few_samples.config_on(tmp_path, 2, **{"data.augment": ["flip"], "data.cache_bytes": cache_bytes}).data
    split = loader.open_split(config, str(tmp_path), few_samples.holding_out(manifest), "train")
    numbers = np.arange(16)
    raws = None if split.load() else [*split.read(numbers)]
    plain = split.batch(numbers, raws, None).images
    assert plain[:, 0, 0].tolist() == [[1, 2]] * 16
    turned = split.batch(numbers, raws, 7).images[:, 0, 0].tolist()
    assert {tuple(row) for row in turned} == {(1, 2), (2, 1)}
    backwards = None if raws is None else raws[::-1]
    again = split.batch(numbers[::-1].copy(), backwards, 7).images[:, 0, 0].tolist()
    assert again == turned[::-1]  # drawn by the sample, not by its place in the batch
    streamed = split.batch(numbers, [*split.read(numbers)], 7).images[:, 0, 0].tolist()
    assert streamed == turned


def test_the_window_is_what_shuffle_bytes_hold(made: tuple[str, Manifest]) -> None:
    """Of the mean bytes of a stored sample, those held out counted too; at least one sample."""
    stored = sum(shard.bytes for shard in made[1].splits["train"]) // 5
    assert split_of(made, "train", shuffle_bytes=3 * stored).window == 3
    assert split_of(made, "train", shuffle_bytes=3 * stored - 1).window == 2
    assert split_of(made, "train", shuffle_bytes=1).window == 1


@pytest.mark.parametrize(
    ("labels", "fraction", "held"), [([0] * 8 + [1] * 4, 0.25, {0: 2, 1: 1}), ([0, 1] * 3, 0.34, {0: 1, 1: 1})]
)
def test_val_is_drawn_in_each_class_in_proportion(labels: list[int], fraction: float, held: dict[int, int]) -> None:
    """A quarter of 8 and of 4; a third of 3 and of 3."""
    drawn = shards.draw_val(np.array(labels), fraction, seed=0)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert {label: [labels[i] for i in drawn].count(label) for label in (0, 1)} == held
    assert drawn.tolist() == shards.draw_val(np.array(labels), fraction, seed=0).tolist()
    assert len({tuple(shards.draw_val(np.array(labels), fraction, seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("fraction", "left"), [(0.1, "leaves 4 to train on and 0 for val"), (0.9, "leaves 0 to train on")]
)
def test_a_val_that_leaves_nothing_is_refused(fraction: float, left: str) -> None:
    with pytest.raises(UserError, match=rf"data\.val_fraction={fraction} of 4 train samples {left}"):
        shards.draw_val(np.array([0, 0, 1, 1]), fraction, seed=0)


def test_only_the_shards_of_a_split_need_be_there(made: tuple[str, Manifest]) -> None:
    Path(made[0], "train-1.tar").unlink()
    with pytest.raises(UserError, match=r"train-1\.tar' is missing"):
        split_of(made, "train")
    assert len(split_of((made[0], few_samples.holding_out(made[1], (0, 0))), "val")) == 1
