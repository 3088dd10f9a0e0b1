"""Sources: digits, idx, folders and tars, and what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import tarfile

import few_samples
import numpy as np
import pytest

from pipeline.base.errors import UserError
from pipeline.data import decoder, shards, sources
from pipeline.data.parts import Part, Source
from pipeline.settings.data import Data


def test_digits_are_the_real_ones_split_by_class():
    source = sources.open_source(Data(), seed=0)
    assert (len(source.train.labels), len(source.test.labels)) == (1437, 360)
    share = np.bincount(source.test.labels) / np.bincount(np.concatenate([source.train.labels, source.test.labels]))
    assert np.all(np.abs(share - 0.2) < 0.01)
    canvas = decoder.decode(source.train.read(0), 1)
    assert canvas.shape == (8, 8, 1)
    assert max(decoder.decode(source.train.read(i), 1).max() for i in range(20)) == 255
    assert not np.array_equal(source.test.labels, sources.open_source(Data(), seed=1).test.labels)


def test_a_source_says_what_it_needs(monkeypatch):
    for name in ("idx", "folder", "imagenet", "shards"):
        with pytest.raises(UserError, match=rf"data: source '{name}' reads from data.root, which is not set"):
            sources.open_source(Data(source=name), 0)
    sources.require_root(Data())
    sources.require_root(Data(source="imagenet"), planned=True)
    with pytest.raises(UserError, match=r"source 'idx' reads from data.root"):
        sources.require_root(Data(source="idx"), planned=True)
    with pytest.raises(UserError, match=r"data.source=shards is not built from anything"):
        sources.open_source(Data(source="shards", root="/somewhere"), 0)
    assert [name for name, kind in sources.SOURCES.items() if kind.in_place] == ["shards"]


def test_a_source_is_its_row_and_nothing_else(monkeypatch):
    """Two images of one class, added as a source is: a function, a row."""
    part = Part(np.zeros(2, np.int64), ("", ""), lambda i: sources.Grey(np.zeros((1, 1), np.uint8)))
    made = Source(("a",), 1, part, part, "two")
    monkeypatch.setitem(sources.SOURCES, "two", sources.Kind(lambda config, seed: made, needs_root=False))
    assert sources.open_source(Data(source="two"), 0) is made


def write_idx(folder, prefix="train", count=6, packed=False, torn=0):
    pixels = np.arange(count * 12, dtype=np.uint8).reshape(count, 4, 3)
    for name, header, body in (
        (f"{prefix}-images-idx3-ubyte", struct.pack(">IIII", 2051, count, 4, 3), pixels.tobytes()),
        (f"{prefix}-labels-idx1-ubyte", struct.pack(">II", 2049, count), bytes(i % 3 for i in range(count))),
    ):
        data = header + body
        if packed:
            data = gzip.compress(data)
            name += ".gz"
        (folder / name).write_bytes(data[: len(data) - torn])
    return pixels


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    pixels = write_idx(tmp_path, packed=packed)
    write_idx(tmp_path, "t10k", count=3, packed=packed)
    source = sources.open_source(Data(source="idx", root=str(tmp_path)), 0)
    assert source.num_classes == 3
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.array_equal(decoder.decode(source.train.read(4), 1)[:, :, 0], pixels[4])
    wider = sources.open_source(Data(source="idx", root=str(tmp_path), classes=10), 0)
    assert wider.num_classes == 10
    with pytest.raises(UserError, match=r"data\.classes=2"):
        sources.open_source(Data(source="idx", root=str(tmp_path), classes=2), 0)


def test_idx_mistakes(tmp_path):
    config = Data(source="idx", root=str(tmp_path))
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte"):
        sources.open_source(config, 0)
    write_idx(tmp_path, "t10k")
    for packed in (False, True):
        write_idx(tmp_path, packed=packed, torn=5)
        with pytest.raises(UserError, match=r"fetch it again"):
            sources.open_source(config, 0)
        for file in tmp_path.glob("train-*"):
            file.unlink()
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 2) + b"ab")
    with pytest.raises(UserError, match=r"6 images but 2 labels"):
        sources.open_source(config, 0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x0d\x03" + bytes(100))
    with pytest.raises(UserError, match=r"does not start as"):
        sources.open_source(config, 0)


def pack(root, target, mode="w"):
    with tarfile.open(target, mode) as archive:
        for part in sorted(p.name for p in root.iterdir()):
            archive.add(root / part, arcname=f"./{part}")
    return str(target)


def test_folder_and_tar_of_it_are_the_same(class_folder, tmp_path):
    (class_folder / "train" / "n01" / ".hidden.jpg").write_bytes(b"x")
    (class_folder / "train" / "n01" / "notes.txt").write_bytes(b"x")
    folder = sources.open_source(Data(source="folder", root=str(class_folder)), 0)
    tar = sources.open_source(Data(source="folder", root=pack(class_folder, tmp_path / "all.tar")), 0)
    assert folder.classes == tar.classes == ("n01", "n02")
    assert folder.fingerprint == tar.fingerprint
    assert folder.train.names == tar.train.names
    assert len(folder.train.labels) == 30
    assert len(folder.test.labels) == 6  # val counts as test where there is no test
    for i in (0, 7, 29):
        original = (class_folder / folder.train.names[i]).read_bytes()
        assert folder.train.read(i) == tar.train.read(i) == original


def test_class_index(class_folder, tmp_path):
    index = tmp_path / "index.json"
    config = Data(source="folder", root=str(class_folder), class_index=str(index))
    with pytest.raises(UserError, match=r"does not exist"):
        sources.open_source(config, 0)
    index.write_text(json.dumps({"0": ["n05", "hen"], "1": ["n02", "cat"], "2": ["n01", "dog"]}))
    source = sources.open_source(config, 0)
    assert (source.num_classes, source.classes) == (3, ("hen", "cat", "dog"))
    assert set(source.train.labels.tolist()) == {1, 2}
    assert source.train.labels[0] == 2  # n01 sorts first
    index.write_text(json.dumps({"0": ["n05", "hen"], "1": ["n02", "cat"]}))
    with pytest.raises(UserError, match=r"n01"):
        sources.open_source(config, 0)
    for wrong in ([1], {"0": "n01"}, {"1": ["n01", "x"]}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"class_index"):
            sources.open_source(config, 0)


def test_folder_mistakes(class_folder, tmp_path):
    def open_(root):
        return sources.open_source(Data(source="folder", root=str(root)), 0)

    with pytest.raises(UserError, match=r"does not exist"):
        open_(tmp_path / "nowhere")
    packed = pack(class_folder, tmp_path / "all.tar.gz", "w:gz")
    with pytest.raises(UserError, match=r"gunzip"):
        open_(packed)
    (class_folder / "val" / "n99").mkdir()
    (class_folder / "val" / "n99" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"n99"):
        open_(class_folder)
    (class_folder / "train").rename(class_folder / "other")
    with pytest.raises(UserError, match=r"has no train/<class>/\*.*found: val"):
        open_(class_folder)
    (class_folder / "other").rename(class_folder / "train")
    (class_folder / "train" / "loose.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"outside a class folder"):
        open_(class_folder)


@pytest.mark.parametrize("name", ["/train/n01/a.jpg", "train/../../a.jpg"])
def test_tars_that_lead_out_are_refused(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"leads out"):
        sources.open_source(Data(source="folder", root=str(tmp_path / "x.tar")), 0)


@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_torn_tar_is_refused(class_folder, tmp_path, cut):
    path = tmp_path / "all.tar"
    pack(class_folder, path)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1].offset  # cut at the border of a member too: tarfile says nothing there
    path.write_bytes(path.read_bytes()[: int(last * cut) if cut < 0.9 else last])
    with pytest.raises(UserError, match=r"cut short|not a whole tar"):
        sources.open_source(Data(source="folder", root=str(path)), 0)


def test_links_out_of_the_folder_are_left_out_with_a_warning(class_folder, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (class_folder / "train" / "n01" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.warns(UserWarning, match=r"link\.jpg"):
        source = sources.open_source(Data(source="folder", root=str(class_folder)), 0)
    assert len(source.train.labels) == 30


def three_parts(class_folder):
    """The folder with a val/ beside a test/."""
    shutil.copytree(class_folder / "val", class_folder / "test")
    return Data(source="folder", root=str(class_folder))


def test_a_val_part_beside_test_is_val(class_folder, tmp_path):
    config = three_parts(class_folder)
    source = sources.open_source(config, 0)
    assert (len(source.train.labels), len(source.val.labels), len(source.test.labels)) == (30, 6, 6)
    assert {name.split("/")[0] for name in source.val.names} == {"val"}
    manifest = shards.build(config, 0, str(tmp_path / "shards"))
    sizes = {split: sum(shard.samples for shard in parts) for split, parts in manifest.splits.items()}
    assert sizes == {"train": 30, "val": 6, "test": 6}
    assert not manifest.val_is_cut_from_train
    with pytest.warns(UserWarning, match=r"data.val_fraction=0.3 is ignored: data.root has a val part of its own"):
        sources.open_source(config.model_copy(update={"val_fraction": 0.3}), 0)


def test_a_val_that_is_drawn_is_known_as_that(class_folder, tmp_path):
    config = Data(source="folder", root=str(class_folder))
    shards.build(config, 0, str(tmp_path / "shards"))
    assert shards.load_manifest(str(tmp_path / "shards")).val_is_cut_from_train


def test_of_train_alone_a_part_is_test(class_folder):
    shutil.rmtree(class_folder / "val")
    config = Data(source="folder", root=str(class_folder), test_fraction=0.2)
    with pytest.warns(UserWarning, match=r"neither test/ nor val/: 20% of train \(data.test_fraction\)"):
        source = sources.open_source(config, 0)
    assert (len(source.train.labels), len(source.test.labels)) == (24, 6)
    assert not set(source.train.names) & set(source.test.names)
    assert np.bincount(source.test.labels).tolist() == [3, 3]
    for part in (source.train, source.test):
        assert part.read(3) == (class_folder / part.names[3]).read_bytes()


def test_links_are_followed_where_that_is_set(class_folder, tmp_path):
    """A class folder and an image that are links out of the root, and one that leads back into itself."""
    elsewhere = tmp_path / "elsewhere"
    shutil.rmtree(class_folder / "val/n01")
    shutil.move(class_folder / "train/n01", elsewhere)
    (class_folder / "train/n01").symlink_to(elsewhere)
    (class_folder / "train/n02/circle").symlink_to(class_folder / "train")
    outside = tmp_path / "outside.jpg"
    shutil.move(class_folder / "train/n02/pic.1.jpg", outside)
    (class_folder / "train/n02/pic.1.jpg").symlink_to(outside)
    followed = sources.open_source(Data(source="folder", root=str(class_folder), follow_links=True), 0)
    assert len(followed.train.labels) == 30
    with pytest.warns(UserWarning, match=r"3 link\(s\).*set data.follow_links=true"):
        left = sources.open_source(Data(source="folder", root=str(class_folder)), 0)
    assert len(left.train.labels) == 14


def test_labels_that_are_ids_are_refused(tmp_path):
    for label in (2_119_789, 4_000_000_000):
        for part in ("train", "test"):
            few_samples.write_shard(tmp_path / f"{part}-0.tar", [([[1]], label), ([[2]], 0)])
        with pytest.raises(UserError, match=rf"has the label {label}, and labels count classes from 0.*WordNet"):
            shards.index(str(tmp_path), val_fraction=0.5)
