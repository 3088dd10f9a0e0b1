"""Small shards of real digits, harmed in one place by chance, and what may come of each."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import few_samples
import numpy as np
from faults.limits import command, main
from PIL import Image
from tiny_run import TINY, merged

from pipeline.base.errors import UserError
from pipeline.data import loader, manifest, shards
from pipeline.settings.config import parse_config
from pipeline.settings.data import Data

DIGITS = Data(source="digits", shard_samples=110, val_fraction=0.1)
GOOD = "good"  # the folder of whole shards, beside those of the cases


class Payload:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch MARKER",)


def whole_shards(folder: Path) -> None:
    """Shards of the digits, as `shards build` writes them."""
    shards.build(DIGITS, 0, str(folder / GOOD))


def picture(kind: str = "PNG", mode: str = "L", size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 7).save(stream, kind, **options)
    return stream.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that declares side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header declares 60,000 x 60,000 pixels."""
    data = bytearray(picture("JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def images() -> dict[str, tuple[bytes, bool]]:
    """Odd images by name, and whether they can be read."""
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 100, 200)]
    animated = io.BytesIO()
    frames[0].save(animated, "PNG", save_all=True, append_images=frames[1:])
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8040, np.uint16)).save(deep, "PNG")
    large = picture("JPEG", "RGB", (64, 64))
    return {
        "empty": (b"", False), "text": (b"no image", False), "bomb": (bomb(60_000), False),
        "jpeg bomb": (jpeg_bomb(), False), "half a JPEG": (large[: len(large) // 2], False),
        "GIF": (picture("GIF"), False), "cut PNG": (picture()[:40], False), "16 bits": (deep.getvalue(), True),
        "CMYK": (picture("JPEG", "CMYK"), True), "animated": (animated.getvalue(), True), "RGB": (large, True),
        "pickle": (pickle.dumps(Payload()), False),
    }  # fmt: skip


Entry = tuple[tarfile.TarInfo, bytes]


def entries(path: Path) -> list[Entry]:
    with tarfile.open(path) as archive:
        return [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]


def packed(parts: list[Entry], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
        for member, data in parts:
            member.size = len(data) if member.type == tarfile.REGTYPE else member.size
            archive.addfile(member, io.BytesIO(data) if member.type == tarfile.REGTYPE else None)
    return stream.getvalue()


def raw_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that declares any size."""
    member = tarfile.TarInfo(name)
    member.size, member.type = abs(size), kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = (size + 256**12).to_bytes(12, "big")
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def other(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **fields: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    for key, value in fields.items():
        setattr(member, key, value)
    return member


# Members that are none of a sample. A tar with one of them holds the same samples.
EXTRAS: dict[str, Callable[[], Entry]] = {
    "symlink": lambda: (other("zz.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
    "hard link": lambda: (other("zz.png", tarfile.LNKTYPE, "../../etc/passwd"), b""),
    "device": lambda: (other("zz.png", tarfile.CHRTYPE, devmajor=1, devminor=5), b""),
    "fifo": lambda: (other("zz.png", tarfile.FIFOTYPE), b""),
    "folder": lambda: (other("zz/", tarfile.DIRTYPE), b""),
    "meta": lambda: (other("__index__"), b"x"),
    "no suffix": lambda: (other("README"), b"x"),
}
# Further members of a sample that is there: passed over, never loaded.
PAYLOADS = ("pyd", "pth", "pickle", "pkl", "npy", "pt", "py", "json")


def rewrite(chance: random.Random, parts: list[Entry]) -> tuple[bytes, str, str]:
    """A tar with other members: its bytes, what was done, and what becomes of it when it is indexed.

    `same`: the samples are those of before; `image`: one is another; `bad`: one cannot be read; `refused`.
    """
    place = 2 * chance.randrange(1, len(parts) // 2)  # of a sample's label; its image follows
    label, image = parts[place : place + 2]
    before, after = parts[:place], parts[place + 2 :]
    kind = chance.choice(["extra", "payload", "name", "label", "image", "twice", "lost", "raw", "pax"])
    if kind == "extra":
        what = chance.choice([*EXTRAS])
        return packed([*before, EXTRAS[what](), label, image, *after]), what, "same"
    if kind == "payload":
        what = label[0].name.replace("cls", chance.choice(PAYLOADS))
        return packed([*before, label, image, (other(what), pickle.dumps(Payload())), *after]), what, "same"
    if kind == "name":
        new = chance.choice(["/etc/x", "../../x", "a/../../b", "ünï/ço∂e", "x" * 90])
        label[0].name, image[0].name = f"{new}.cls", f"{new}.png"
        return packed(parts, tarfile.GNU_FORMAT), f"name {new[:20]}", "same"
    if kind == "label":
        text = chance.choice([b"", b"x", b"-1", b"10", b"9" * 18, b"9" * 400, b"1.0", b"0x1", b"\xd9\xa1"])
        return packed([*before, (label[0], text), image, *after]), f"label {text[:20]!r}", "refused"
    if kind == "image":
        what, (data, readable) = chance.choice([*images().items()])
        return packed([*before, label, (image[0], data), *after]), what, "image" if readable else "bad"
    if kind == "twice":
        again = chance.choice([label, image])
        return packed([*before, label, image, again, *after]), f"{again[0].name} twice", "refused"
    if kind == "lost":
        return packed([*before, chance.choice([label, image]), *after]), "a member lost", "refused"
    start = packed(before)[: 1024 * place]
    what, header = chance.choice(RAW if kind == "raw" else PAX)
    return start + header + packed(parts[place:]), what, "refused"


def _record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def _pax(**fields: str) -> bytes:
    """An extended header for the member that follows."""
    records = b"".join(_record(key.replace("__", "."), value) for key, value in fields.items())
    return raw_header("pax", len(records), tarfile.XHDTYPE) + records + bytes(-len(records) % 512)


# Headers that lie: about sizes, or in a way that costs a reader memory or time.
RAW = [
    ("8 GiB", raw_header("zz.bin", 2**33)),
    ("4 EiB", raw_header("zz.png", 2**62)),
    ("a negative size", raw_header("zz.bin", -512)),
    ("sparse", raw_header("zz.png", 2**40, tarfile.GNUTYPE_SPARSE)),
    ("a long name of 1 TiB", raw_header("zz", 2**40, tarfile.GNUTYPE_LONGNAME)),
    ("names of names", raw_header("zz", 512, tarfile.GNUTYPE_LONGNAME) * 3000),
]
PAX = [
    ("pax size", _pax(size=str(2**60))),
    ("negative pax size", _pax(size="-512")),
    ("pax sparse 1.0", _pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize=str(2**40))),
    ("pax sparse map", _pax(GNU__sparse__map="0,x", GNU__sparse__size="1")),
    ("long pax digits", _pax(comment="1" * 200_000)),
    ("long pax path", _pax(path="x" * 200_000)),
]


@cache
def expected(root: str) -> dict[str, bytes]:
    """Every batch of the whole shards."""
    return batches(Path(root), 2**30)


def batches(root: Path, cache_bytes: int) -> dict[str, bytes]:
    """The bytes of each split: train in its shuffled order, val and test in theirs; `bad` counts the unreadable."""
    values = merged(
        TINY, {"data.source": "shards", "data.root": str(root), "data.cache_bytes": cache_bytes, "data.lanes": 4}
    )
    config = parse_config({**values, "tracking": {"enabled": False}}).data
    described = manifest.load_manifest(str(root))
    found: dict[str, bytes] = {}
    bad = 0
    for name in ("train", "val", "test"):
        split = loader.open_split(config, str(root), described, name)
        training = loader.TrainLoader(split, config, batch_size=4, seed=0, rank=0, world=1)
        made = [*(training.epoch(0) if name == "train" else loader.EvalLoader(split, config).batches(0, 1))]
        found[name] = b"".join(
            part.numpy().tobytes() for batch in made for part in (batch.images, batch.labels, batch.weights)
        )
        bad += len(split.bad)
    return {**found, "bad": str(bad).encode()}


def judge(seed: int, case: int, here: Path) -> str:
    """Harm one shard, with the manifest of the whole ones or with one of its own, and look at what is read."""
    chance = random.Random(f"{seed}/{case}")
    good = here.parent / GOOD
    root = here / "shards"
    shutil.copytree(good, root)
    names = sorted(path.name for path in root.glob("*.tar"))
    name = chance.choice(names)
    try:
        if chance.random() < 0.5:
            return judge_harm(chance, root, good, name, names)
        return judge_foreign(chance, root, good, name)
    finally:
        assert not [*here.rglob("MARKER"), *here.parent.glob("MARKER")], "something was run"


def judge_harm(chance: random.Random, root: Path, good: Path, name: str, names: list[str]) -> str:
    """What happens to shards or a manifest after they were made: it is found, and nothing else than before is read."""
    what = chance.choice(
        ["flip"] * 6 + ["label", "image", "swap", "cut", "longer", "gone", "rewrite", "manifest", "manifest"]
    )
    data = bytearray((root / name).read_bytes())
    if what == "flip":
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif what in ("label", "image"):
        parts = entries(root / name)
        ending = "cls" if what == "label" else "png"
        one, two = chance.sample([i for i, (member, _) in enumerate(parts) if member.name.endswith(ending)], 2)
        parts[one], parts[two] = (parts[one][0], parts[two][1]), (parts[two][0], parts[one][1])
        data = bytearray(packed(parts))
    elif what == "swap":
        data = bytearray((root / chance.choice([n for n in names if n != name])).read_bytes())
    elif what == "cut":
        data = data[: chance.randrange(len(data))]
    elif what == "longer":
        data += bytes(chance.randrange(1, 2000))
    elif what == "rewrite":
        data = bytearray(rewrite(chance, entries(root / name))[0])
    (root / name).write_bytes(data)
    if what == "gone":
        (root / name).unlink()
    if what == "manifest":
        harm_manifest(chance, root)
    same = described(root) == described(good)
    changed = not same or not (root / name).exists() or (root / name).read_bytes() != (good / name).read_bytes()
    try:
        problems = shards.verify(str(root))
    except UserError as error:
        problems = [str(error)]
    assert bool(problems) == changed or not same, (what, name, problems)
    outcomes = set()
    for cache_bytes in (2**30, 0):
        read: dict[str, bytes] = {}
        message = command(lambda cache_bytes=cache_bytes, read=read: read.update(batches(root, cache_bytes)))
        if message is None:
            assert read == expected(str(good)), f"{what}: other samples were read than before"
        else:
            assert name in message or "manifest" in message, message
        outcomes.add("read as before" if message is None else "refused")
    assert outcomes != {"refused"} or changed, what
    return f"{what}: {' or '.join(sorted(outcomes))}"


def described(root: Path) -> list[bytes]:
    """What a manifest's files hold."""
    return [path.read_bytes() for path in sorted(root.glob("manifest*"))]


def harm_manifest(chance: random.Random, root: Path) -> None:
    """A number, a name or a byte of a manifest changed, of today's or of an older one, all of which is JSON."""
    path, older = root / "manifest.json", chance.random() < 0.5
    if older:
        path.write_text(json.dumps(few_samples.version_1(manifest.load_manifest(str(root)))))
    if chance.random() < 0.5:
        path = chance.choice([path] if older else sorted(root.glob("manifest*")))
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        return
    tree = json.loads(path.read_text())
    odd = chance.choice(
        [-1, 0, 10**6, 10**30, 10**400, 1.5, None, "", "x", [], {}, True, "../../etc/passwd", "/etc/passwd", "a\0b"]
    )
    places: list[tuple[Any, Any]] = [(tree, key) for key in tree]
    if older:
        shard = chance.choice([shard for shards in tree["splits"].values() for shard in shards])
        places += [(shard, key) for key in shard] * 2 + [(shard[key], 3) for key in ("offsets", "labels", "crc32")]
    else:
        places += [(tree[part], key) for part in ("splits", "columns") for key in tree[part]] * 2
    holder, key = chance.choice(places)
    holder[key] = odd
    path.write_text(json.dumps(tree))


def judge_foreign(chance: random.Random, root: Path, good: Path, name: str) -> str:
    """Shards that were odd when they were indexed: refused by name then, or read rightly."""
    data, what, wanted = rewrite(chance, entries(root / name))
    (root / name).write_bytes(data)
    (root / "manifest.json").unlink()
    message = command(lambda: shards.index(str(root), num_classes=10))
    if wanted == "refused":
        assert message is not None, (what, name)
        assert name in message, message
        return "index: refused"
    assert message is None, (what, message)
    problems = shards.verify(str(root))
    before = expected(str(good))
    for cache_bytes in (2**30, 0):
        read = batches(root, cache_bytes)
        if wanted == "same":
            assert (problems, read) == ([], before), (what, problems, read["bad"])
        else:
            assert read["bad"] == (b"1" if wanted == "bad" else b"0"), (what, read["bad"])
            assert len(problems) == (wanted == "bad"), (what, problems)
            assert [key for key in before if read[key] != before[key]], what
    return f"index: {wanted}"


if __name__ == "__main__":
    main(judge)
