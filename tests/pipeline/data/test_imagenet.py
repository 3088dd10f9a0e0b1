"""ILSVRC's original files: every layout gives the same data, every mistake one message."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from pipeline.base.errors import UserError
from pipeline.data import decoder, loader, shards, sources
from pipeline.settings.data import Data

# In the devkit's own order: its ids are not the numbers of the sorted wnids.
KIT = {
    1: ("n02119789", "kit fox, Vulpes macrotis"),
    2: ("n01440764", "tench, Tinca tinca"),
    3: ("n02085620", "Chihuahua"),
}
SORTED = ["n01440764", "n02085620", "n02119789"]
TRUTH = [3, 1, 2, 2]
VAL = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 5)]
EACH = 4  # train images of a class


def picture(seed: int, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, kind)
    return stream.getvalue()


def write_kit(root: Path, *, packed: bool = True, truth: list[int] = TRUTH, each: int = EACH, **fields: object) -> Path:
    """A devkit as ILSVRC's: meta.mat, a struct array with an inner node of WordNet after the classes."""
    names = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows = [(n, wnid, words, "a gloss", 0, np.zeros(0), 0, each) for n, (wnid, words) in KIT.items()]
    rows.append((4, "n00001740", "entity", "a gloss", 2, np.array([1.0, 3.0]), 1, 0))
    synsets = np.array([tuple(fields.get(k, v) for k, v in zip(names, r, strict=True)) for r in rows],
                       dtype=[(name, object) for name in names])  # fmt: skip
    folder = root / "ILSVRC2012_devkit_t12"
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data/meta.mat", {"synsets": synsets.reshape(-1, 1)})
    (folder / "data/ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{n}\n" for n in truth))
    if packed:
        with tarfile.open(root / f"{folder.name}.tar.gz", "w:gz") as archive:
            archive.add(folder, folder.name)
        shutil.rmtree(folder)
    return folder


def pack(folder: Path, target: Path) -> None:
    """A folder as a tar of what is in it, which goes."""
    with tarfile.open(target, "w") as archive:
        for child in sorted(folder.iterdir()):
            archive.add(child, child.name)
    shutil.rmtree(folder)


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """train/<wnid>/*, val/*.JPEG and the devkit: RGB, grey, CMYK, and a PNG named .JPEG, as in ImageNet."""
    root = tmp_path / "ilsvrc"
    for c, wnid in enumerate(SORTED):
        (root / "train" / wnid).mkdir(parents=True)
        for i, (kind, mode) in enumerate([("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("JPEG", "L")]):
            (root / "train" / wnid / f"{wnid}_{i}.JPEG").write_bytes(picture(10 * c + i, kind, mode))
    (root / "val").mkdir()
    for i, name in enumerate(VAL):
        (root / "val" / name).write_bytes(picture(100 + i))
    write_kit(root)
    return root


def to_class_tars(root: Path) -> None:
    for wnid in SORTED:
        pack(root / "train" / wnid, root / "train" / f"{wnid}.tar")


def to_tars(root: Path) -> None:
    to_class_tars(root)
    pack(root / "train", root / "ILSVRC2012_img_train.tar")
    pack(root / "val", root / "ILSVRC2012_img_val.tar")


def to_root(root: Path) -> None:
    to_class_tars(root)
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    (root / "train").rmdir()


def to_val_folders(root: Path) -> None:
    for name, number in zip(VAL, TRUTH, strict=True):
        (root / "val" / KIT[number][0]).mkdir(exist_ok=True)
        (root / "val" / name).rename(root / "val" / KIT[number][0] / name)


def to_index_list(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    lines = [f"{name} {SORTED.index(KIT[n][0])}" for name, n in zip(VAL, TRUTH, strict=True)]
    (root / "val.txt").write_text("\n".join(reversed(lines)))


def to_wnid_list(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    lines = [f"val/{name} {KIT[n][0]}" for name, n in zip(VAL, TRUTH, strict=True)]
    (root / "val.txt").write_text("\n".join(lines) + "\n\n")


def to_plain_kit(root: Path) -> None:
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    write_kit(root, packed=False)


def to_tar_kit(root: Path) -> None:
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()


def config(root: Path, **settings: object) -> Data:
    return Data.model_validate({"source": "imagenet", "root": str(root), "channels": 3, "size": 8, **settings})


def open_(root: Path, **settings: object) -> sources.Source:
    return sources.open_source(config(root, **settings), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: None, to_class_tars, to_tars, to_root, to_val_folders, to_index_list, to_wnid_list, to_plain_kit,
        to_tar_kit,
    ],
    ids=lambda change: change.__name__.strip("<>"),
)  # fmt: skip
def test_every_layout_gives_the_same_data(unpacked: Path, change: object) -> None:
    plain = open_(unpacked)
    wanted = [plain.train.read(i) for i in range(12)], [plain.test.read(i) for i in range(4)]
    change(unpacked)  # type: ignore[operator]
    source = open_(unpacked)
    assert source.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert source.test.labels.tolist() == [1, 2, 0, 0]  # ids 3, 1, 2, 2 of the kit
    assert source.train.names == plain.train.names
    assert source.test.names == tuple(f"val/{name}" for name in VAL)
    assert ([source.train.read(i) for i in range(12)], [source.test.read(i) for i in range(4)]) == wanted
    assert source.fingerprint == plain.fingerprint


def test_titles_and_numbers(unpacked: Path, tmp_path: Path) -> None:
    assert open_(unpacked).classes == ("tench", "Chihuahua", "kit fox")
    index = tmp_path / "index.json"
    index.write_text(json.dumps({str(i): [wnid, f"t{i}"] for i, wnid in enumerate(reversed(SORTED))}))
    source = open_(unpacked, class_index=str(index))
    assert source.classes == ("t0", "t1", "t2")
    assert source.test.labels.tolist() == [1, 0, 2, 2]
    to_index_list(unpacked)
    assert open_(unpacked).classes == tuple(SORTED)
    assert open_(unpacked, classes=1000).num_classes == 1000


def test_hidden_and_foreign_files_are_not_images(unpacked: Path) -> None:
    (unpacked / "train" / SORTED[0] / "._n01440764_0.JPEG").write_bytes(b"x")
    (unpacked / "train" / ".DS_Store").write_bytes(b"x")
    (unpacked / "val" / "notes.txt").write_bytes(b"x")
    source = open_(unpacked)
    assert (len(source.train.labels), len(source.test.labels)) == (12, 4)


def test_shards_of_it_are_good_and_val_is_drawn_from_train(unpacked: Path, tmp_path: Path) -> None:
    to_tars(unpacked)
    settings = config(unpacked, val_fraction=0.25, shard_samples=5)
    out = str(tmp_path / "out")
    manifest = shards.build(settings, 0, out)
    counts = {split: sum(s.samples for s in parts) for split, parts in manifest.splits.items()}
    assert counts == {"train": 9, "val": 3, "test": 4}
    assert Counter(label for _, rows in manifest.splits["test"].described() for label in rows.labels.tolist()) == {
        0: 2,
        1: 1,
        2: 1,
    }
    assert shards.verify(out) == []
    train = loader.open_split(settings, out, manifest, "train")
    assert train.load()
    assert train.bad == {}


# Shrinking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_larger_images_shrink_to_the_short_side(mode: str) -> None:
    data = picture(1, "JPEG", mode, (30, 20))
    small = decoder.shrink(data, 10, 90)
    with Image.open(io.BytesIO(small)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (15, 10))
    assert small == decoder.shrink(data, 10, 90)
    assert len(decoder.shrink(data, 10, 30)) < len(small)
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture(1, size=(3, 2)))).resize((30, 20)).convert(mode).save(stream, "JPEG")
    smooth = stream.getvalue()
    difference = decoder.decode(decoder.shrink(smooth, 10, 95), 3).astype(int) - decoder.decode(smooth, 3, 10)
    assert np.abs(difference).mean() < 4  # of 255: what JPEG, its colours at half resolution, does


@pytest.mark.parametrize("data", [picture(1), picture(1, "PNG", "L"), b"not an image", picture(1, size=(30, 20))[:200]])
def test_small_and_unreadable_images_stay_byte_for_byte(data: bytes) -> None:
    assert decoder.shrink(data, 10, 90) == data


def test_shrinking_a_build_resumes_and_ends_the_same(unpacked: Path, tmp_path: Path) -> None:
    (unpacked / "val" / VAL[0]).write_bytes(picture(5, size=(40, 60)))
    settings = config(unpacked, val_fraction=0.25, shard_samples=2, shrink=9)
    shards.build(settings, 0, str(tmp_path / "whole"))

    def killer(message: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.build(settings, 0, str(tmp_path / "killed"), killer)
    shards.build(settings, 0, str(tmp_path / "killed"))
    names = [path.name for path in sorted((tmp_path / "whole").iterdir())]
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "killed" / n).read_bytes() for n in names)
    for changed in ({"shrink": 10}, {"quality": 80}, {"shrink": None}):
        with pytest.raises(UserError, match="choose another folder"):
            shards.build(settings.model_copy(update=changed), 0, str(tmp_path / "whole"))


def test_shrinking_below_the_input_is_refused(unpacked: Path) -> None:
    with pytest.raises(ValueError, match=r"shrink=7 is smaller than resize \(or size\), 8"):
        config(unpacked, shrink=7)


# Mistakes ------------------------------------------------------------------------------------------------------------


def refused(root: Path, *words: str, **settings: object) -> None:
    with pytest.raises(UserError) as caught:
        open_(root, **settings)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_parts_that_are_not_there(unpacked: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "ILSVRC2012_img_train.tar")
    (unpacked / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "kit")
    refused(unpacked, "no labels", "ILSVRC2012_devkit_t12.tar.gz", "val.txt")
    shutil.rmtree(unpacked / "val")
    refused(unpacked, "no val images", "ILSVRC2012_img_val.tar")
    shutil.rmtree(unpacked / "train")
    refused(unpacked, "no train images", "train/")


def test_a_missing_class_is_named(unpacked: Path) -> None:
    shutil.rmtree(unpacked / "train" / "n02085620")
    refused(unpacked, "1 of the 3 classes", "n02085620", "devkit", "data.source=folder")
    (unpacked / "train" / "n02085620").mkdir()
    refused(unpacked, "1 of the 3 classes", "n02085620")
    to_index_list(unpacked)
    refused(unpacked, "no images of 1 of the 3")  # an empty folder, and no kit to tell


def test_an_unknown_wnid_is_named(unpacked: Path) -> None:
    shutil.copytree(unpacked / "train" / SORTED[0], unpacked / "train" / "n99999999")
    refused(unpacked, "n99999999", "devkit")
    (unpacked / "train" / "n99999999").rename(unpacked / "train" / "cats")
    refused(unpacked, "'cats'", "not a wnid")


def test_fewer_train_images_than_the_kit_counts_is_a_warning(unpacked: Path) -> None:
    (unpacked / "train" / SORTED[1] / f"{SORTED[1]}_0.JPEG").unlink()
    with pytest.warns(UserWarning, match="n02085620 3 of 4"):
        open_(unpacked)


def test_a_class_twice(unpacked: Path) -> None:
    shutil.copytree(unpacked / "train" / SORTED[0], unpacked / "copy")
    pack(unpacked / "copy", unpacked / "train" / f"{SORTED[0]}.tar")
    refused(unpacked, SORTED[0], "twice")


def test_val_that_does_not_match_the_ground_truth(unpacked: Path) -> None:
    (unpacked / "val" / VAL[1]).rename(unpacked / "moved.JPEG")
    refused(unpacked, "3 images", "4 lines", f"missing: {VAL[1]}")
    (unpacked / "moved.JPEG").rename(unpacked / "val" / "ILSVRC2012_val_00000009.JPEG")
    refused(unpacked, "4 images", "4 lines", f"missing: {VAL[1]}")
    (unpacked / "val" / "ILSVRC2012_val_00000009.JPEG").rename(unpacked / "val" / "cat.JPEG")
    refused(unpacked, "cat.JPEG", "not named as")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([f"{name} 3" for name in VAL], ("class number 3", "0..2")),  # numbers from 1, or of more classes
        ([f"{name} n09999999" for name in VAL], ("n09999999", "unknown")),
        ([f"{VAL[0]} 1", *(f"{name} n01440764" for name in VAL[1:])], ("class number", "wnid", VAL[0], VAL[1])),
        ([f"{VAL[0]} 1"], ("4 images", "lists 1", "not listed")),
        ([f"{name} 1" for name in (*VAL, "x.JPEG")], ("lists 5", "not there: x.JPEG")),
        ([f"{VAL[0]} 1", f"{VAL[0]} 2"], ("line 2", "stands twice")),
        ([f"{VAL[0]} tench"], ("line 1", "neither")),
        ([f"{VAL[0]} -1"], ("line 1", "neither")),
        (["65"], ("line 1", "neither")),
    ],
)
def test_lists_that_do_not_fit(unpacked: Path, lines: list[str], words: tuple[str, ...]) -> None:
    to_index_list(unpacked)
    (unpacked / "val.txt").write_text("\n".join(lines))
    refused(unpacked, "val.txt", *words)


def test_val_in_class_folders_is_checked_too(unpacked: Path) -> None:
    to_val_folders(unpacked)
    wrong = unpacked / "val" / "n01440764" / VAL[3]
    wrong.rename(unpacked / "val" / "n02085620" / VAL[3])
    refused(unpacked, VAL[3], "another class folder")
    (unpacked / "val" / "n02085620").rename(unpacked / "val" / "n01234567")
    refused(unpacked, "n01234567", "unknown")
    (unpacked / "val" / VAL[0]).write_bytes(b"x")
    refused(unpacked, "both class folders and loose images")


@pytest.mark.parametrize("truth", [[3, 1, 2, 4], [3, 1, 2, 0], [], [1001]])
def test_unknown_ids_in_the_ground_truth(unpacked: Path, truth: list[int]) -> None:
    (unpacked / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    write_kit(unpacked, truth=truth)
    refused(unpacked, "ground_truth.txt", "ids that meta.mat gives to no class", "fetch")


@pytest.mark.parametrize(
    "fields", [{"WNID": "cat"}, {"WNID": "n01440764"}, {"ILSVRC2012_ID": 1}, {"num_children": "x"}]
)
def test_a_kit_that_makes_no_sense(unpacked: Path, fields: dict[str, object]) -> None:
    (unpacked / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    write_kit(unpacked, **fields)
    refused(unpacked, "meta.mat", "fetch")


def test_damaged_kits(unpacked: Path) -> None:
    path = unpacked / "ILSVRC2012_devkit_t12.tar.gz"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(unpacked, path.name, "damaged or cut short")
    path.write_bytes(b"<html>")
    refused(unpacked, path.name, "damaged or cut short")
    path.unlink()
    folder = write_kit(unpacked, packed=False)
    (folder / "data/meta.mat").write_bytes(b"x" * 200)
    refused(unpacked, "meta.mat", "list of synsets")
    (folder / "data/meta.mat").unlink()
    refused(unpacked, "has no data/meta.mat")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_torn_tars(unpacked: Path, name: str) -> None:
    to_tars(unpacked)
    data = (unpacked / name).read_bytes()
    with tarfile.open(unpacked / name) as archive:
        border = archive.getmembers()[-1].offset
    for cut in (len(data) // 2, border):
        (unpacked / name).write_bytes(data[:cut])
        refused(unpacked, name, "again")
    (unpacked / name).write_bytes(gzip.compress(data))
    refused(unpacked, name, "gunzip")


@pytest.mark.parametrize("share", [0.4, "border"])
def test_a_torn_tar_within_the_tar(unpacked: Path, share: float | str) -> None:
    """A class tar that was cut before it was packed: reading must not run on into the next one."""
    to_class_tars(unpacked)
    inner = unpacked / "train" / f"{SORTED[1]}.tar"
    with tarfile.open(inner) as archive:
        border = archive.getmembers()[-1].offset
    data = inner.read_bytes()
    inner.write_bytes(data[: border if share == "border" else int(len(data) * 0.1)])
    pack(unpacked / "train", unpacked / "ILSVRC2012_img_train.tar")
    refused(unpacked, f"{SORTED[1]}.tar", "cut short")


def test_a_file_that_shrinks_after_it_was_listed(unpacked: Path) -> None:
    source = open_(unpacked)
    path = unpacked / "train" / SORTED[0] / f"{SORTED[0]}_0.JPEG"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match="since it was listed"):
        source.train.read(0)


def test_links_out_of_the_root_are_refused(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.JPEG").write_bytes(picture(1))
    link = unpacked / "train" / SORTED[0] / "link.JPEG"
    link.symlink_to(tmp_path / "secret.JPEG")
    refused(unpacked, "link.JPEG", "link out of data.root")
    link.unlink()
    (unpacked / "train" / SORTED[0]).rename(tmp_path / "away")
    (unpacked / "train" / SORTED[0]).symlink_to(tmp_path / "away")
    refused(unpacked, SORTED[0], "link out of data.root")


def test_a_class_index_of_other_classes(unpacked: Path, tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"0": ["n01440764", "tench"], "1": ["n00000001", "x"]}))
    refused(unpacked, "list other classes", "n00000001", class_index=str(index))
    to_index_list(unpacked)
    refused(unpacked, "1 of the 2 classes", "n00000001", class_index=str(index))
