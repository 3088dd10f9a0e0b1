"""Building, indexing and checking shards."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile

import few_samples
import numpy as np
import pytest
import webdataset as wds

from pipeline.base.errors import UserError
from pipeline.base.spread import here, processes
from pipeline.data import decoder, loader, shards, sources
from pipeline.settings.data import Data

SMALL = Data(shard_samples=300)  # digits: 1,293 train, 144 val, 360 test


def files(root):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    return root, shards.build(SMALL, 0, str(root))


def test_build_writes_every_sample_once_and_a_manifest_that_loads(built):
    root, manifest = built
    assert shards.load_manifest(str(root)).identity == manifest.identity
    assert {split: sum(s.samples for s in parts) for split, parts in manifest.splits.items()} == {
        "train": 1293,
        "val": 144,
        "test": 360,
    }
    [columns] = [name for name in files(root) if name.endswith(".columns")]
    assert sorted(files(root)) == [
        columns,
        "manifest.json", "test-00000.tar", "test-00001.tar", *(f"train-0000{i}.tar" for i in range(5)), "val-00000.tar"
    ]  # fmt: skip
    rows = {split: [rows for _, rows in part.described()] for split, part in manifest.splits.items()}
    labels = np.concatenate([each.labels for part in rows.values() for each in part])
    source = sources.open_source(SMALL, 0)
    everything = np.concatenate([source.train.labels, source.test.labels])
    assert np.array_equal(np.bincount(labels), np.bincount(everything))
    val = np.bincount(rows["val"][0].labels)
    assert np.all(np.abs(val - np.bincount(source.train.labels) * 144 / 1437) < 1)


def test_plain_webdataset_reads_what_build_wrote(built):
    root, manifest = built
    seen = 0
    for shard, rows in manifest.splits["train"].described():
        dataset = wds.WebDataset(str(root / shard.name), shardshuffle=False)
        for sample, label in zip(dataset, rows.labels, strict=True):
            assert int(sample["cls"]) == label
            assert decoder.decode(sample["png"], 1).shape == (8, 8, 1)
            seen += 1
    assert seen == 1293


def test_offsets_hash_and_order(built):
    root, manifest = built
    for shard, rows in manifest.splits["train"].described():
        data = (root / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(root / shard.name) as archive:
            members = archive.getmembers()
        assert [m.offset for m in members[::2]] == rows.offsets.tolist()
        assert {(m.mtime, m.uid, m.uname) for m in members} == {(0, 0, "")}
        assert len(set(rows.labels.tolist())) == 10  # mixed: every class in every shard
        names = [m.name for m in members[::2]]
        assert names != sorted(names)  # shuffled: keys number the samples as the source has them


def test_processes_write_and_describe_the_same_shards(built, tmp_path):
    spread = processes(2, worth_it_s=0.0)
    made = shards.build(SMALL, 0, str(tmp_path), spread=spread)
    assert files(tmp_path) == files(built[0])
    assert made.identity == built[1].identity
    assert shards.verify(str(tmp_path), spread=spread) == []
    (tmp_path / "train-00002.tar").write_bytes(b"x")
    assert shards.verify(str(tmp_path), spread=spread) == shards.verify(str(tmp_path))
    shutil.copy(built[0] / "train-00002.tar", tmp_path)
    indexed = [shards.index(str(tmp_path), spread=each)[0].identity for each in (spread, here)]
    assert indexed[0] == indexed[1]


def test_building_twice_gives_the_same_bytes_and_another_seed_does_not(built, tmp_path):
    shards.build(SMALL, 0, str(tmp_path / "again"))
    assert files(tmp_path / "again") == files(built[0])
    shards.build(SMALL, 1, str(tmp_path / "other"))
    assert files(tmp_path / "other")["train-00000.tar"] != files(built[0])["train-00000.tar"]


def test_a_killed_build_goes_on_and_ends_the_same(built, tmp_path):
    def killer(message, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.build(SMALL, 0, str(tmp_path), killer)
    assert not (tmp_path / "manifest.json").exists()
    first = (tmp_path / "train-00000.tar").stat().st_mtime_ns
    (tmp_path / "train-00001.tar").write_bytes(b"torn")  # a shard that was damaged since is made again
    (tmp_path / ".train-00003.tar.0123456789ab.tmp").write_bytes(b"half a shard")
    shards.build(SMALL, 0, str(tmp_path))
    assert (tmp_path / "train-00000.tar").stat().st_mtime_ns == first
    assert files(tmp_path) == files(built[0])
    again = []
    shards.build(SMALL, 0, str(tmp_path), lambda *args: again.append(args))
    assert again == []  # finished: nothing to do


def test_a_folder_of_other_shards_is_not_overwritten(built, tmp_path):
    root, _ = built
    before = files(root)
    with pytest.raises(UserError, match=r"choose another folder"):
        shards.build(SMALL, 1, str(root))
    assert files(root) == before

    def killer(message, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.build(SMALL, 0, str(tmp_path), killer)
    with pytest.raises(UserError, match=r"choose another folder"):
        shards.build(SMALL, 1, str(tmp_path))


def test_folder_images_are_copied_and_named_by_content(class_folder, tmp_path):
    config = Data(source="folder", root=str(class_folder), shard_samples=10, channels=3, size=10)
    manifest = shards.build(config, 0, str(tmp_path / "out"))
    originals = {path.read_bytes() for path in class_folder.rglob("*.*") if path.is_file()}
    copies = set()
    for shard in (s for part in manifest.splits.values() for s in part):
        for sample in wds.WebDataset(str(tmp_path / "out" / shard.name), shardshuffle=False):
            (kind,) = {"jpg", "png"} & sample.keys()
            assert sample[kind].startswith(b"\x89PNG" if kind == "png" else b"\xff\xd8")
            copies.add(sample[kind])
    assert copies == originals
    train = loader.open_split(config, str(tmp_path / "out"), manifest, "train")
    assert train.load()
    assert train.bad == {}  # CMYK, grey, and a PNG called .JPEG are good images
    assert shards.verify(str(tmp_path / "out")) == []


def write_foreign(root, counts, *, kind="jpg", json_label=False, labels=None, picture, prefix="train"):
    """Shards as any WebDataset program writes them."""
    root.mkdir(exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with wds.TarWriter(str(root / f"{prefix}-{shard:03d}.tar")) as writer:
            for _ in range(count):
                label = labels[number] if labels else number % 3
                sample = {"__key__": f"s{number:04d}", kind: picture(number, "PNG" if kind == "png" else "JPEG")}
                sample |= {"json": {"class": label, "more": "x"}} if json_label else {"cls": label}
                writer.write(sample)
                number += 1


@pytest.mark.parametrize(("kind", "json_label"), [("jpg", False), ("png", True), ("jpeg", True)])
def test_foreign_shards_work_after_index(tmp_path, picture, kind, json_label):
    root = tmp_path / "foreign"
    root.mkdir()
    with wds.ShardWriter(str(root / "train-%06d.tar"), maxcount=12, verbose=0) as writer:
        for i in range(30):
            label = {"json": {"class": i % 3}} if json_label else {"cls": i % 3}
            writer.write({"__key__": f"k{i:03d}", kind: picture(i, "PNG" if kind == "png" else "JPEG"), **label})
    write_foreign(root, [6], kind=kind, json_label=json_label, picture=picture, prefix="test")
    calls = []
    manifest, warned = shards.index(
        str(root), "class" if json_label else "cls", 0.2, 0, None, lambda *args: calls.append(args)
    )
    assert (manifest.num_classes, warned) == (3, [])
    assert [call[1:] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert shards.load_manifest(str(root)).identity == manifest.identity
    assert manifest.holdout
    assert manifest.splits["train"].held.sum() == 6
    config = Data(source="shards", root=str(root), channels=3, size=8, lanes=2, eval_batch=4)
    splits = {name: loader.open_split(config, str(root), manifest, name) for name in ("train", "val", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 24, "val": 6, "test": 6}
    assert np.bincount(splits["val"].labels).tolist() == [2, 2, 2]
    for cache in (2**20, 0):
        keys = []
        for name in ("train", "val"):
            split = loader.open_split(config.model_copy(update={"cache_bytes": cache}), str(root), manifest, name)
            keys += [raw.key for raw in split.read(np.arange(len(split)))]
            batches = list(loader.EvalLoader(split, split.config).batches(0, 1))
            assert np.concatenate([b.indices for b in batches]).tolist() == list(range(len(split)))
            assert all(b.weights.min() == 1 for b in batches)
        assert sorted(keys) == [f"k{i:03d}" for i in range(30)]
    assert shards.verify(str(root)) == []


def test_without_test_shards_val_counts_as_test(tmp_path, picture):
    root = tmp_path / "x"
    write_foreign(root, [20], picture=picture)
    with pytest.raises(UserError, match=r"test\*\.tar or val\*\.tar"):
        shards.index(str(root))
    write_foreign(root, [5], picture=picture, prefix="val")
    manifest, _ = shards.index(str(root))
    assert [s.name for s in manifest.splits["test"]] == ["val-000.tar"]
    assert "val" not in manifest.splits
    write_foreign(root, [4], picture=picture, prefix="test")
    manifest, _ = shards.index(str(root))
    assert not manifest.holdout
    assert manifest.splits.keys() == {"train", "val", "test"}


def test_index_warns_of_shards_sorted_by_class(tmp_path, picture):
    root = tmp_path / "x"
    write_foreign(root, [30, 30], labels=[0] * 15 + [1] * 15 + [i % 2 for i in range(30)], picture=picture)
    write_foreign(root, [5], picture=picture, prefix="test")
    _, warned = shards.index(str(root))
    assert len(warned) == 1
    assert "train-000.tar" in warned[0]


def one_sample(root, **members):
    root.mkdir(exist_ok=True)
    with wds.TarWriter(str(root / "train-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "good", "jpg": b"", "cls": b"0"})
        if members:
            writer.write({"__key__": "odd", **members})
    with wds.TarWriter(str(root / "test-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "good", "jpg": b"", "cls": b"0"})


@pytest.mark.parametrize(
    ("members", "label", "message"),
    [
        ({"jpg": b""}, "cls", "no .cls"),
        ({"cls": b"1"}, "cls", "no image"),
        ({"jpg": b"", "png": b"", "cls": b"1"}, "cls", "two images"),
        ({"jpg": b"", "cls": b"one"}, "cls", "not an integer"),
        ({"jpg": b"", "cls": b"-1"}, "cls", "negative"),
        ({"jpg": b"", "cls": b"7"}, "cls", "5 classes"),
    ],
)
def test_index_names_shard_and_key_of_a_wrong_sample(tmp_path, members, label, message):
    one_sample(tmp_path, **members)
    with pytest.raises(UserError, match=rf"train-0\.tar.*odd.*{message}"):
        shards.index(str(tmp_path), label, num_classes=5)
    assert not (tmp_path / "manifest.json").exists()


def test_index_can_skip_bad_samples_and_counts_them(tmp_path, picture):
    """8 good samples of 12: no label, no image, a torn image, and a key with a dot."""
    good = {"jpg": picture(1, "JPEG"), "cls": b"2"}
    samples = [(f"good{i}", {**good, "jpg": picture(i, "JPEG"), "cls": b"%d" % (i % 3)}) for i in range(8)]
    samples.insert(0, ("unlabelled", {"jpg": good["jpg"]}))
    samples.insert(3, ("torn", {"jpg": good["jpg"][:60], "cls": b"1"}))
    samples.insert(4, ("imageless", {"cls": b"7"}))
    samples.append(("cat.v2", good))
    for part in ("train", "test"):
        with wds.TarWriter(str(tmp_path / f"{part}-0.tar"), encoder=False) as writer:
            for key, members in samples:
                writer.write({"__key__": key, **members})
    with pytest.raises(UserError, match=r"'unlabelled' has no \.cls member: mend it.*--skip-bad`$"):
        shards.index(str(tmp_path))
    manifest, notes = shards.index(str(tmp_path), val_fraction=0.25, skip_bad=True)
    assert notes[0].startswith("8 of 24 samples are skipped: 4 without an image, 2 without a label, 2 unreadable; ")
    assert notes[0].endswith("train-0.tar': sample 'unlabelled' has no .cls member")
    assert notes[1].startswith("2 of the skipped samples have dots in their keys, such as 'cat.v2.jpg'")
    assert manifest.splits["train"].rows(0).skipped.tolist() == [0, 3, 4, 11]
    assert manifest.sizes == {"train": 6, "val": 2, "test": 8}
    assert manifest.num_classes == 3
    assert shards.load_manifest(str(tmp_path)).identity == manifest.identity
    assert shards.verify(str(tmp_path)) == []
    config = Data(source="shards", root=str(tmp_path), channels=3, size=8, lanes=2, eval_batch=4)
    keys = []
    for cache in (0, 2**20):
        for name in ("train", "val", "test"):
            given = config.model_copy(update={"cache_bytes": cache})
            split = loader.open_split(given, str(tmp_path), manifest, name)
            keys += [raw.key for raw in split.read(np.arange(len(split)))]
            batches = list(loader.EvalLoader(split, given).batches(0, 1))
            assert all(batch.weights.min() == 1 for batch in batches)
            labels = [int(key[-1]) % 3 for key in keys[-len(split) :]]
            assert np.concatenate([batch.labels for batch in batches]).tolist() == labels
    assert sorted(keys) == sorted(4 * [f"good{i}" for i in range(8)])
    everything = json.dumps(few_samples.version_1(manifest))
    assert "[0, 3, 4, 11]" in everything
    for wrong in ("[0, 3, 4, 12]", "[3, 0, 4, 11]", f"{[*range(12)]}"):
        (tmp_path / "manifest.json").write_text(everything.replace("[0, 3, 4, 11]", wrong))
        with pytest.raises(UserError, match=r"manifest\.json' is damaged"):
            shards.load_manifest(str(tmp_path))


def test_a_key_with_a_dot_is_named_where_it_costs_a_sample_its_image(tmp_path, picture):
    for part in ("train", "test"):
        with wds.TarWriter(str(tmp_path / f"{part}-0.tar"), encoder=False) as writer:
            writer.write({"__key__": "cat.v2", "jpg": picture(0, "JPEG"), "cls": b"0"})
    message = r"sample 'cat' has no image \(a key ends at the first dot, which cuts 'cat\.v2\.jpg' short\): rename"
    with pytest.raises(UserError, match=message):
        shards.index(str(tmp_path))
    with pytest.raises(UserError, match=r"none of the samples of train can be used; the first: .*cat\.v2"):
        shards.index(str(tmp_path), skip_bad=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "not valid JSON"), (b"{}", "no field"), (b'{"y": true}', "not an int"), (b'{"y": 1.0}', "not an")],
)
def test_index_of_wrong_json(tmp_path, text, message):
    one_sample(tmp_path)
    with wds.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "odd", "jpg": b"", "json": text})
    with pytest.raises(UserError, match=rf"train-0\.tar.*odd.*{message}"):
        shards.index(str(tmp_path), "y")


def test_empty_torn_and_compressed_shards(tmp_path, picture):
    root = tmp_path / "x"
    write_foreign(root, [10], picture=picture)
    write_foreign(root, [5], picture=picture, prefix="test")
    whole = (root / "train-000.tar").read_bytes()
    with tarfile.open(root / "train-000.tar") as archive:
        border = archive.getmembers()[7].offset
    with tarfile.open(root / "train-001.tar", "w"):
        pass
    with pytest.raises(UserError, match=r"train-001\.tar.*no samples"):
        shards.index(str(root))
    for cut in (b"", whole[: border + 700], whole[:border], whole[: border + 100]):
        (root / "train-001.tar").write_bytes(cut)
        with pytest.raises(UserError, match=r"train-001\.tar"):
            shards.index(str(root))
    (root / "train-001.tar").unlink()
    (root / "train-001.tar.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"unpack"):
        shards.index(str(root))


def test_verify_lists_each_problem(tmp_path):
    shards.build(SMALL, 0, str(tmp_path))
    (tmp_path / "val-00000.tar").unlink()
    torn = tmp_path / "train-00001.tar"
    torn.write_bytes(torn.read_bytes()[:5000])
    flipped = bytearray((tmp_path / "train-00002.tar").read_bytes())
    name = bytes(flipped[: flipped.index(b".")]).decode()  # the key of the first sample
    with tarfile.open(tmp_path / "train-00002.tar") as archive:
        place = next(m for m in archive if m.name.endswith("png")).offset_data
    flipped[place + 45] ^= 0xFF
    flipped[place + 20] ^= 0xFF
    (tmp_path / "train-00002.tar").write_bytes(flipped)
    problems = "\n".join(shards.verify(str(tmp_path)))
    assert "val-00000.tar' is missing" in problems
    assert "train-00001.tar' has 5000 bytes" in problems
    assert "train-00002.tar' has another SHA-256" in problems
    assert f"1 unreadable image(s): {name}" in problems
    assert "train-00000.tar" not in problems


def test_manifest_mistakes(tmp_path, built):
    with pytest.raises(UserError, match=r"shards build.*shards index"):
        shards.load_manifest(str(tmp_path))
    good = few_samples.version_1(built[1])
    for change in (
        lambda m: m.update(version=99),
        lambda m: m["splits"]["train"][0].update(name="../x.tar"),
        lambda m: m["splits"]["train"][0]["labels"].pop(),
        lambda m: m["splits"]["train"][0].pop("sha256"),
        lambda m: m["splits"].pop("test"),
        lambda m: m.update(holdout=[[99, 0]]),
    ):
        broken = json.loads(json.dumps(good))
        change(broken)
        (tmp_path / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"manifest\.json"):
            shards.load_manifest(str(tmp_path))


def test_too_small_a_val_fraction(tmp_path):
    with pytest.raises(UserError, match=r"val_fraction"):
        shards.build(Data(val_fraction=0.0001), 0, str(tmp_path))


def test_real_imagenette_labels_by_class_index(real_data, tmp_path):
    tar = real_data / "imagenette-224-subset.tar"
    index = real_data / "imagenet_class_index.json"
    source = sources.open_source(Data(source="folder", root=str(tar), class_index=str(index), channels=3), 0)
    assert source.num_classes == 1000
    assert (len(source.train.labels), len(source.test.labels)) == (2500, 800)
    assert sorted(set(source.train.labels.tolist()))[:3] == [0, 217, 482]
    assert source.classes[0] == "tench"
    assert decoder.decode(source.test.read(799), 3).shape == (224, 224, 3)
