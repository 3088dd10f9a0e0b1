"""Decoded images on disk: the batches that memory and shards give, checked, within bounds, made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import few_samples
import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.data import loader, shards
from pipeline.data.decoded import DecodedCache
from pipeline.data.decoder import Pixels
from pipeline.data.manifest import Manifest
from pipeline.data.split import Batch, Split

SIZE, SAMPLES = 4, 12
RNG = np.random.default_rng(0)
# Images of different sizes, of which one cannot be read.
IMAGES: list[few_samples.Sample] = [
    ([] if number == 5 else RNG.integers(0, 256, (5 + number % 3, 6)).tolist(), number % 3) for number in range(SAMPLES)
]
AUGMENTS: list[list[str]] = [["flip"], ["crop", "flip"], ["resized-crop"]]


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Manifest]:
    for split in ("train", "val", "test"):
        few_samples.write_shard(tmp_path / f"shards/{split}-0.tar", IMAGES)
    return tmp_path / "shards", shards.index(str(tmp_path / "shards"), num_classes=3)[0]


def split_of(made: tuple[Path, Manifest], name: str, **data: Any) -> Split:
    config = few_samples.config_on(made[0], SIZE, **{f"data.{key}": value for key, value in data.items()})
    return loader.open_split(config.data, str(made[0]), made[1], name)


def epoch(split: Split) -> list[bytes]:
    """The bytes of all batches: train in its order, others in theirs."""
    if split.name == "train":
        batches: Iterator[Batch] = loader.TrainLoader(split, split.config, batch_size=4, seed=3, rank=0, world=1).epoch(
            1
        )
    else:
        batches = loader.EvalLoader(split, split.config).batches(0, 1)
    return [b"".join(part.numpy().tobytes() for part in (b.images, b.labels, b.weights, b.indices)) for b in batches]


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("augment", AUGMENTS, ids="-".join)
def test_memory_shards_and_disk_give_the_same(
    augment: list[str], name: str, made: tuple[Path, Manifest], tmp_path: Path
) -> None:
    common: dict[str, Any] = {"augment": augment, "eval_batch": 5, "resize": SIZE + 3}
    memory = split_of(made, name, **common)
    streamed = split_of(made, name, **common, cache_bytes=0)
    disk = split_of(made, name, **common, cache_bytes=0, decoded_cache=str(tmp_path / "cache"))
    assert (memory.load(), streamed.load(), disk.load()) == (True, False, True)
    assert epoch(memory) == epoch(streamed) == epoch(disk)
    if name == "train":  # without augmentation, as samples for statistics are read
        numbers = np.arange(SAMPLES)
        plain = [split.batch(numbers, None, None).images for split in (memory, disk)]
        plain.append(streamed.batch(numbers, [*streamed.read(numbers)], None).images)
        assert (plain[0] == plain[1]).all()
        assert (plain[0] == plain[2]).all()


def test_it_is_made_once_and_anew_for_other_settings(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    def decoded(**data: Any) -> int:
        seen: list[int] = []
        split = split_of(made, "train", cache_bytes=0, decoded_cache=str(tmp_path / "cache"), **data)
        split.load(lambda text, done, total: seen.append(done))
        return len(seen)

    assert decoded(augment=["crop"]) == 1
    assert decoded(augment=["crop", "flip"]) == 0
    assert decoded(augment=["resized-crop"]) == 1
    assert decoded(augment=["resized-crop"], decoder="pillow") == 1
    assert decoded() == 1
    assert len([*(tmp_path / "cache").glob("*.pixels")]) == 4


def test_an_image_that_was_harmed_is_found(made: tuple[Path, Manifest], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_bytes": 0, "decoded_cache": str(tmp_path / "cache"), "augment": ["crop"]}
    before = epoch(split_of(made, "train", **settings))
    [file] = (tmp_path / "cache").glob("*.pixels")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"data\.decoded_cache: '{file}' is damaged: delete it"):
        epoch(split_of(made, "train", **settings))
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is damaged"):
        epoch(split_of(made, "train", **settings))
    file.unlink()
    assert epoch(split_of(made, "train", **settings)) == before
    [index] = (tmp_path / "cache").glob("*.npy")
    for harmed in (b"", b"no array", index.read_bytes()[:-1], index.read_bytes().replace(b"width", b"depth")):
        index.write_bytes(harmed)
        with pytest.raises(UserError, match=rf"'{index}' is damaged: delete it"):
            epoch(split_of(made, "train", **settings))


@pytest.mark.parametrize("name", ["train", "val"])
def test_what_does_not_fit_is_streamed_and_said(name: str, made: tuple[Path, Manifest], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache_bytes": 0, "augment": ["crop"], "decoded_cache": str(tmp_path / "cache")}
    split = split_of(made, name, **settings, decoded_cache_bytes=100)
    with pytest.warns(UserWarning, match=r"a split does not fit \(data\.decoded_cache_bytes=100\)"):
        assert not split.load()
    assert epoch(split) == epoch(split_of(made, name, **{**settings, "decoded_cache": None}))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".too-large"]
    again, seen = split_of(made, name, **settings, decoded_cache_bytes=100), list[int]()
    with pytest.warns(UserWarning, match="does not fit"):
        assert not again.load(lambda text, done, total: seen.append(done))
    assert seen == []  # it is remembered


def images(count: int) -> Iterator[Pixels]:
    return iter(np.full((count, 10, 10, 1), 7, np.uint8))


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = DecodedCache(str(tmp_path), 250)
    assert cache.split("a", 1, 1, images(1)) is not None
    assert cache.split("b", 1, 1, images(1)) is not None
    assert cache.split("a", 1, 1, iter(())) is not None  # it is there
    assert cache.split("c", 1, 1, images(1)) is not None
    assert len([*tmp_path.glob("*.pixels")]) == len([*tmp_path.glob("*.npy")]) == 2
    kept = cache.split("a", 1, 1, iter(()))
    assert kept is not None
    assert kept[0].shape == (10, 10, 1)


def test_a_disk_without_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50))
    with pytest.warns(UserWarning, match="does not fit \\(50 bytes are free\\)"):
        assert DecodedCache(str(tmp_path), 250).split("a", 1, 1, images(1)) is None


def test_a_folder_that_is_none_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.decoded_cache=.*/file.* cannot be used"):
        DecodedCache(str(tmp_path / "file/below"), 250).split("a", 1, 1, images(1))
