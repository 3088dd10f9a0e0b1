"""The loaders: the same batches streamed or from memory, for any number of workers, resumed at any step."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
import webdataset as wds

from pipeline.base.errors import UserError
from pipeline.data import loader, placement, shards
from pipeline.settings.data import Data

DIGITS = Data(
    shard_samples=200, size=8, lanes=4, eval_batch=50, shuffle_bytes=100_000, augment=("shift", "flip"), shift=1
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = str(tmp_path_factory.mktemp("digits"))
    return root, shards.build(DIGITS, 0, root)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, picture):
    """Foreign shards with images of several sizes and two bad ones (train samples 3 and 25)."""
    root = tmp_path_factory.mktemp("mixed")
    for name, count in (("train-0", 20), ("train-1", 23), ("test-0", 7)):
        with wds.TarWriter(str(root / f"{name}.tar"), encoder=False) as writer:
            for i in range(count):
                data = picture(i, "JPEG" if i % 2 else "PNG", size=(12 + i % 5, 14 + i % 3))
                if (name, i) in (("train-0", 3), ("train-1", 5)):
                    data = data[: len(data) // 2]
                writer.write({"__key__": f"{name}-{i:03d}", "png": data, "cls": str(i % 3).encode()})
    manifest, _ = shards.index(str(root), val_fraction=0.25, seed=1)
    return str(root), manifest


MIXED = Data(source="shards", root="x", channels=3, size=12, resize=13, lanes=3, eval_batch=4, shuffle_bytes=15_000)


def streamed(config: Data) -> Data:
    return config.model_copy(update={"cache_bytes": 0})


def train(config, data, rank=0, world=1, batch=24, seed=5):
    split = loader.open_split(config, *data, "train")
    return loader.TrainLoader(split, config, batch_size=batch, seed=seed, rank=rank, world=world)


def equal(a: loader.Batch, b: loader.Batch) -> bool:
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


CASES = [
    ("digits", DIGITS),
    ("mixed", MIXED),
    ("mixed", MIXED.model_copy(update={"augment": ("crop", "flip")})),
    ("mixed", MIXED.model_copy(update={"augment": ("resized-crop", "shift")})),
    ("mixed", MIXED.model_copy(update={"decode_threads": 4, "resize": None, "size": 20})),
]


@pytest.mark.parametrize(("data", "config"), CASES)
def test_streamed_and_cached_batches_are_equal_to_the_bit(request, data, config):
    where = request.getfixturevalue(data)
    from_memory, from_shards = train(config, where, batch=12), train(streamed(config), where, batch=12)
    for epoch in (0, 3):
        one, other = list(from_memory.epoch(epoch)), list(from_shards.epoch(epoch))
        assert len(one) == len(other) == from_memory.steps_per_epoch
        assert all(equal(a, b) for a, b in zip(one, other, strict=True))
    assert from_memory.split.load()
    assert not from_shards.split.load()
    assert from_memory.split.bad == from_shards.split.bad


@pytest.mark.parametrize("small", [True, False])
def test_small_and_large_images_take_other_threads_but_give_the_same(mixed, monkeypatch, small):
    from pipeline.data import split

    monkeypatch.setattr(split, "_SMALL", 10**9 if small else 0)
    batches = list(train(streamed(MIXED), mixed, batch=12).epoch(0))
    assert all(equal(a, b) for a, b in zip(batches, train(MIXED, mixed, batch=12).epoch(0), strict=True))


def test_batches_are_what_placement_says(digits):
    config = streamed(DIGITS)
    full = train(config, digits)
    assert full.steps_per_epoch == 1293 // 4 // 6
    assert 1 < full.split.window < 200
    for step, batch in enumerate(full.epoch(2)):
        expected = placement.batch_indices(
            full.split.counts, 5, 2, step, lanes=4, batch_size=24, window=full.split.window
        )
        assert batch.indices.tolist() == expected.tolist()
        assert batch.labels.tolist() == full.split.labels[expected].tolist()
        assert batch.images.shape == (24, 1, 8, 8)


@pytest.mark.parametrize("config", [DIGITS, streamed(DIGITS)])
def test_any_number_of_workers_gets_the_same_samples(digits, config):
    whole = list(itertools.islice(train(config, digits).epoch(1), 3))
    for world in (2, 3, 4):
        ranks = [list(itertools.islice(train(config, digits, rank, world).epoch(1), 3)) for rank in range(world)]
        for step in range(3):
            parts = [dataclasses.astuple(batches[step]) for batches in ranks]
            union = loader.Batch(*(torch.cat(column) for column in zip(*parts, strict=True)))
            assert equal(union, whole[step])


@pytest.mark.parametrize("config", [DIGITS, streamed(DIGITS)])
def test_resume_gives_exactly_the_later_batches(digits, config):
    full = train(config, digits)
    batches = list(full.epoch(4))
    for start in (0, 1, 17, full.steps_per_epoch - 1, full.steps_per_epoch):
        rest = list(full.epoch(4, start))
        assert len(rest) == full.steps_per_epoch - start
        assert all(equal(a, b) for a, b in zip(rest, batches[start:], strict=True))


def test_resume_reads_only_from_the_resume_point_on(digits):
    full = train(streamed(DIGITS).model_copy(update={"shuffle_bytes": 10_000}), digits)
    lane = placement.epoch_lanes(full.split.counts, 5, 0, total=4, window=full.split.window)[0]
    start = full.steps_per_epoch - 4
    read = list(full._read_lane(lane, start))
    assert len(read) == 4 * 6
    positions = full.split._pieces(lane.line[placement.resume_point(lane.order, start * 6) :])
    assert sum(len(piece.wanted) for piece in positions) < 4 * 6 + 2 * full.split.window + 6


def test_epochs_differ_in_order_and_augmentation(digits):
    config = DIGITS
    full = train(config, digits)
    one, other = (next(iter(full.epoch(epoch))) for epoch in (0, 1))
    assert one.indices.tolist() != other.indices.tolist()
    by_sample = [
        {int(i): image for batch in full.epoch(epoch) for i, image in zip(batch.indices, batch.images, strict=True)}
        for epoch in (0, 1)
    ]
    both = by_sample[0].keys() & by_sample[1].keys()
    assert sum(torch.equal(by_sample[0][i], by_sample[1][i]) for i in both) < len(both) / 4


@pytest.mark.parametrize("config", [MIXED, streamed(MIXED)])
def test_bad_images_keep_their_slot_with_weight_zero(mixed, config):
    split = loader.open_split(config, *mixed, "train")
    batches = list(loader.EvalLoader(split, config).batches(0, 1))
    weights = torch.cat([batch.weights for batch in batches])
    pixels = torch.cat([batch.images for batch in batches])
    val = loader.open_split(config, *mixed, "val")
    list(loader.EvalLoader(val, config).batches(0, 1))
    bad = split.bad | val.bad
    assert sorted(key.rsplit("/", 1)[1] for key in bad) == ["train-0-003", "train-1-005"]
    assert all(bad.values())
    assert len(weights) == len(split)
    assert int((weights == 0).sum()) == len(split.bad)
    assert pixels[weights == 0].sum() == 0
    assert len(split) + len(val) == 43


@pytest.mark.parametrize("config", [DIGITS, streamed(DIGITS)])
def test_evaluation_reads_each_sample_once_for_any_number_of_workers(digits, config):
    split = loader.open_split(config, *digits, "test")
    evaluation = loader.EvalLoader(split, config)
    whole = list(evaluation.batches(0, 1))
    assert [len(batch.labels) for batch in whole] == [50] * 7 + [10]
    assert torch.cat([batch.indices for batch in whole]).tolist() == list(range(360))
    for world in (2, 3, 9):
        for rank in range(world):
            mine = list(evaluation.batches(rank, world))
            assert len(mine) == len(whole[rank::world])
            assert all(equal(a, b) for a, b in zip(mine, whole[rank::world], strict=True))


def test_limit_is_stratified_and_seeded(digits):
    split = loader.open_split(DIGITS, *digits, "test")
    some = loader.EvalLoader(split, DIGITS, limit=100, seed=3)
    assert len(some) == 100
    assert np.all(np.bincount(split.labels[some.indices]) >= 9)
    assert np.array_equal(some.indices, loader.EvalLoader(split, DIGITS, limit=100, seed=3).indices)
    assert not np.array_equal(some.indices, loader.EvalLoader(split, DIGITS, limit=100, seed=4).indices)
    config = streamed(DIGITS)
    other = loader.EvalLoader(loader.open_split(config, *digits, "test"), config, limit=100, seed=3)
    assert all(equal(a, b) for a, b in zip(some.batches(1, 2), other.batches(1, 2), strict=True))
    assert len(loader.EvalLoader(split, DIGITS, limit=10_000)) == 360


def test_labels_in_streamed_batches_are_mixed(digits):
    kinds = [len(set(batch.labels.tolist())) for batch in train(DIGITS, digits).epoch(0)]
    assert abs(np.mean(kinds) - 10 * (1 - 0.9**24)) < 0.4  # classes among 24 random samples: 9.2


@pytest.mark.parametrize("small", [True, False])
def test_closing_early_ends_the_threads(digits, monkeypatch, small):
    from pipeline.data import split

    monkeypatch.setattr(split, "_SMALL", 10**9 if small else 0)
    before = set(threading.enumerate())
    batches = train(streamed(DIGITS), digits).epoch(0)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def copy(digits, tmp_path):
    """The digits shards as links, so that one can be replaced."""
    root, manifest = digits
    for shard in (s for part in manifest.splits.values() for s in part):
        (tmp_path / shard.name).hardlink_to(f"{root}/{shard.name}")
    return str(tmp_path), manifest


def test_missing_and_shortened_shards_are_named_at_once(digits, tmp_path):
    data = copy(digits, tmp_path)
    path = tmp_path / "train-00002.tar"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(UserError, match=r"train-00002\.tar' is missing.*shards verify"):
        train(DIGITS, data)
    path.write_bytes(whole[:-700])
    with pytest.raises(UserError, match=r"train-00002\.tar' has \d+ bytes.*shards verify"):
        train(DIGITS, data)
    loader.open_split(DIGITS, *data, "val")  # the other splits are whole


def test_samples_are_read_in_any_order_asked_for(digits):
    split = loader.open_split(DIGITS, *digits, "train")
    keys = [raw.key for raw in split.read(np.arange(len(split)))]
    asked = np.array([5, 3, 4, 1200, 199, 200, 7, 7])
    assert [raw.key for raw in split.read(asked)] == [keys[number] for number in asked]
    assert list(split.read(asked[:0])) == []


@pytest.mark.parametrize("config", [DIGITS, streamed(DIGITS)])
def test_a_shard_of_other_content_and_equal_size_is_noticed(digits, tmp_path, config):
    data = copy(digits, tmp_path)
    path = tmp_path / "train-00001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        labels = [m.offset_data for m in archive if m.name.endswith(".cls")]
        border = archive.getmembers()[100].offset
    swapped = bytearray(whole)
    swapped[labels[9]] = ord("0") + (whole[labels[9]] - ord("0") + 1) % 10
    for other in (
        bytes(swapped),
        whole[:border] + bytes(len(whole) - border),
        whole[:border] + b"x" * 99 + whole[border:-99],
    ):
        path.unlink()
        path.write_bytes(other)
        with pytest.raises(UserError, match=r"train-00001\.tar.*shards verify"):
            list(train(config, data, batch=4).epoch(0))


def test_labels_outside_the_classes_and_too_few_samples(digits):
    with pytest.raises(UserError, match=r"train-0000\d\.tar': sample \d+ has the label [5-9].*5 classes"):
        train(DIGITS.model_copy(update={"classes": 5}), digits)
    with pytest.raises(UserError, match=r"too few for one step of batch_size=4000"):
        train(DIGITS, digits, batch=4000)
    with pytest.raises(UserError, match=r"exclude each other"):
        train(DIGITS.model_copy(update={"augment": ("crop", "resized-crop")}), digits)
    with pytest.raises(UserError, match=r"data\.lanes=4"):
        train(DIGITS, digits, 0, 5)


def test_cache_is_given_up_when_images_do_not_fit(mixed):
    config = MIXED.model_copy(update={"augment": ("crop",), "cache_bytes": 15_000})
    split = loader.open_split(config, *mixed, "train")
    assert not split.load()
    calls = []
    roomy = loader.open_split(MIXED, *mixed, "train")
    assert roomy.load(lambda *args: calls.append(args))
    assert calls[-1] == ("decoding train", len(roomy), len(roomy))


def test_real_mnist(real_data, tmp_path):
    for prefix, count in (("train", 6000), ("t10k", 200)):  # the first images of the real files, to be quick
        for kind, head, width in (("images-idx3", 16, 784), ("labels-idx1", 8, 1)):
            with gzip.open(real_data / "mnist" / f"{prefix}-{kind}-ubyte.gz") as stream:
                data = bytearray(stream.read(head + count * width))
            data[4:8] = count.to_bytes(4, "big")
            (tmp_path / f"{prefix}-{kind}-ubyte").write_bytes(data)
    config = Data(source="idx", root=str(tmp_path))
    manifest = shards.build(config, 0, str(tmp_path / "shards"))
    split = loader.open_split(config, str(tmp_path / "shards"), manifest, "train")
    assert len(split) == 5400
    batches = list(loader.TrainLoader(split, config, batch_size=128, seed=0, rank=0, world=1).epoch(0))
    mean = torch.cat([batch.images for batch in batches]).float().mean() / 255
    assert abs(float(mean) - 0.1307) < 0.005  # MNIST's well-known mean
    assert split.bad == {}
