"""Where images come from before they are shards: digits, the idx files of MNIST, class folders, ImageNet.

To add a source, write a function from (settings, seed) to Source and put it into SOURCES.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import lookup
from pipeline.base.seeding import generator
from pipeline.data import imagenet, placement
from pipeline.data.decoder import shrink
from pipeline.data.parts import IMAGE_ENDINGS, SPLITS, Entry, Item, Part, Sizes, Source, read_class_index, tar_files
from pipeline.settings.base import is_default
from pipeline.settings.data import Data


@dataclass(frozen=True)
class Kind:
    """A kind of source, and what others ask of it.

    open(config, seed): the source, to build shards from; None where data.root holds the user's own shards, which are
    used in place.
    needs_root: it reads from data.root.
    sizes: its numbers of samples and classes, where they are known without its files.
    """

    open: Callable[[Data, int], Source] | None
    needs_root: bool = True
    sizes: Sizes | None = None

    @property
    def in_place(self) -> bool:
        """Whether data.root holds the user's own shards, and none are built."""
        return self.open is None


def of(config: Data) -> Kind:
    """The kind of source that the settings name. Raises UserError for an unknown one."""
    return lookup(SOURCES, config.source, "data.source")


def require_root(config: Data, *, planned: bool = False) -> None:
    """Raise UserError for an unknown source, or one that reads from data.root where that is not set.

    With `planned`, a source whose `sizes` are known needs no data.root.
    """
    kind = of(config)
    if kind.needs_root and config.root is None and not (planned and kind.sizes):
        raise UserError(f"data: source '{config.source}' reads from data.root, which is not set: add data.root=PATH")


def open_source(config: Data, seed: int) -> Source:
    """The source that the settings name. Raises UserError naming the file and the remedy."""
    require_root(config)
    kind = of(config)
    if kind.open is None:
        raise UserError(
            f"data.source={config.source} is not built from anything: run `secateur shards index` on data.root, or "
            "choose another source"
        )
    source = kind.open(config, seed)
    if source.val is not None and not is_default(config, "val_fraction"):
        warnings.warn(
            f"data.val_fraction={config.val_fraction} is ignored: data.root has a val part of its own", stacklevel=2
        )
    if config.shrink is not None:
        source = _shrunk(source, config.shrink, config.quality)
    if config.classes is None:
        return source
    if config.classes < source.num_classes:
        raise UserError(
            f"data.classes={config.classes} is fewer than the {source.num_classes} classes of the source: leave it "
            "out, or raise it"
        )
    return replace(source, num_classes=config.classes)


def _shrunk(source: Source, short: int, quality: int) -> Source:
    """The source with every image's short side brought down to `short` pixels as it is read."""

    def smaller(part: Part) -> Part:
        return replace(part, item=lambda number: _Shrunk(part.item(number), short, quality))

    fingerprint = f"{source.fingerprint} shrink={short} quality={quality}"
    val = None if source.val is None else smaller(source.val)
    return replace(source, train=smaller(source.train), test=smaller(source.test), val=val, fingerprint=fingerprint)


def extension(data: bytes, name: str) -> str:
    """png or jpg by content; a file that is neither keeps what its name says, and counts as bad when read."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    return "png" if name.lower().endswith(".png") else "jpg"


@dataclass(frozen=True)
class _Shrunk:
    """An image whose short side is brought down as it is read."""

    item: Item
    short: int
    quality: int

    def read(self) -> bytes:
        return shrink(self.item.read(), self.short, self.quality)


@dataclass(frozen=True)
class Grey:
    """An image of one channel, (H, W), read as a PNG."""

    pixels: NDArray[np.uint8]

    def read(self) -> bytes:
        """The PNG."""
        stream = io.BytesIO()
        Image.fromarray(self.pixels).save(stream, "PNG")
        return stream.getvalue()


def _array_part(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Part:
    return Part(labels, ("",) * len(labels), lambda i: Grey(images[i]))


def _hash(*arrays: NDArray[np.generic]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _digits(config: Data, seed: int) -> Source:
    spec = find_spec("sklearn")  # the file is read as it is: to import the package takes two seconds
    assert spec is not None
    assert spec.origin is not None
    rows = np.loadtxt(Path(spec.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    images = np.round(rows[:, :-1].reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
    test = _test_numbers(labels, config.test_fraction, seed)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Source(
        tuple(str(digit) for digit in range(10)),
        10,
        _array_part(images[train], labels[train]),
        _array_part(images[test], labels[test]),
        _hash(images, labels),
    )


def _idx(config: Data, seed: int) -> Source:
    assert config.root is not None
    arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(config.root, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(config.root, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        if len(images) != len(labels):
            raise UserError(
                f"'{config.root}': {prefix} has {len(images)} images but {len(labels)} labels: fetch both files again"
            )
        arrays[part] = (images, labels.astype(np.int64))
    num_classes = 1 + max(int(labels.max()) for _, labels in arrays.values())
    return Source(
        tuple(map(str, range(num_classes))),
        num_classes,
        _array_part(*arrays["train"]),
        _array_part(*arrays["test"]),
        _hash(*arrays["train"], *arrays["test"]),
    )


def _read_idx(root: str, name: str, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, .gz or not. Raises UserError where it is missing, torn or something else."""
    names = (name, name + ".gz")
    url = next((storage.join(root, n) for n in names if storage.exists(storage.join(root, n))), None)
    if url is None:
        raise UserError(f"data.root='{root}' holds neither {names[0]} nor {names[1]}: add it, or set data.root")
    header_bytes = 4 + 4 * dimensions
    with storage.open_range(url) as raw:
        stream = gzip.GzipFile(fileobj=raw) if url.endswith(".gz") else raw
        try:
            header = stream.read(header_bytes)
            if len(header) < header_bytes or header[:4] != bytes([0, 0, 8, dimensions]):
                raise UserError(f"'{url}' does not start as an idx file of bytes with {dimensions} dimension(s) does")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            expected = math.prod(shape)
            # One byte more than expected shows a file that is too long; a zip bomb is never unpacked whole.
            data = stream.read(expected + 1)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"'{url}' is damaged or cut short ({error}): fetch it again") from error
    if len(data) != expected or expected == 0:
        found = "more" if len(data) > expected else str(len(data))
        raise UserError(
            f"'{url}' says {'x'.join(map(str, shape))} = {expected} bytes but holds {found}: fetch it again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _folder(config: Data, seed: int) -> Source:
    assert config.root is not None
    path = storage.local_path(config.root)
    if path.is_dir():
        entries = _list_folder(path, config.follow_links)
    elif path.is_file():
        entries = list(tar_files(config.root, _wanted, title=f"data.root='{config.root}'"))
    else:
        raise UserError(f"data.root='{config.root}' does not exist: set it to a folder or a tar of train/<class>/*")
    parts: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.name):
        parts.setdefault(entry.name.split("/", 1)[0], []).append(entry)
    if "train" not in parts:
        found = ", ".join(sorted(parts)) or "no images at all"
        raise UserError(f"data.root='{config.root}' has no train/<class>/* (.jpeg, .jpg, .png); found: {found}")
    if "test" not in parts and "val" in parts:
        parts["test"] = parts.pop("val")  # ILSVRC calls what is looked at once `val`
    classes, numbers = _class_numbers(config, parts["train"])
    made = {part: _entry_part(config.root, entries, numbers, config.class_index) for part, entries in parts.items()}
    fingerprint = hashlib.sha256(
        "\n".join(f"{e.name} {e.size}" for part in SPLITS if part in parts for e in parts[part]).encode()
    ).hexdigest()
    if "test" in parts:
        return Source(classes, len(classes), made["train"], made["test"], fingerprint, made.get("val"))
    warnings.warn(
        f"data.root='{config.root}' has neither test/ nor val/: {config.test_fraction:.0%} of train "
        "(data.test_fraction), drawn by seed, are held out as test",
        stacklevel=2,
    )
    fingerprint += f" test={config.test_fraction}"
    return Source(classes, len(classes), *held_out(made["train"], config.test_fraction, seed), fingerprint)


def held_out(train: Part, fraction: float, seed: int) -> tuple[Part, Part]:
    """A part cut in two: what is left as train, and a share held out as test, drawn by seed."""
    test = _test_numbers(train.labels, fraction, seed)
    return _chosen(train, np.setdiff1d(np.arange(len(train.labels)), test)), _chosen(train, test)


def _test_numbers(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    """Which samples are test, drawn by seed. Rounded up, as scikit-learn's own split does: 360 of 1,797 for 0.2."""
    return placement.stratified(labels, math.ceil(fraction * len(labels)), generator(seed, "test"))


def _chosen(part: Part, numbers: NDArray[np.int64]) -> Part:
    """The samples of a part with these numbers."""
    names = tuple(part.names[number] for number in numbers)
    return Part(part.labels[numbers], names, lambda i: part.item(int(numbers[i])))


def _entry_part(root: str, entries: list[Entry], numbers: dict[str, int], index: str | None) -> Part:
    unknown = sorted({entry.name.split("/")[1] for entry in entries} - numbers.keys())
    if unknown:
        part = entries[0].name.split("/")[0]
        where = f"data.class_index='{index}'" if index else "train"
        raise UserError(
            f"'{root}': {part} has {len(unknown)} class folder(s) that {where} does not know "
            f"({', '.join(unknown[:5])}): rename or remove them, or complete the class index"
        )
    labels = np.array([numbers[entry.name.split("/")[1]] for entry in entries], np.int64)
    return Part(labels, tuple(entry.name for entry in entries), lambda i: entries[i])


def _class_numbers(config: Data, train: list[Entry]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class titles by number, and the number of each class folder."""
    if config.class_index is None:
        folders = tuple(sorted({entry.name.split("/")[1] for entry in train}))
        return folders, {folder: number for number, folder in enumerate(folders)}
    return read_class_index(config.class_index)


def _wanted(name: str) -> bool:
    """Whether a path in the source is an image of a part; hidden files are not. UserError outside a class folder."""
    parts = name.split("/")
    if parts[0] not in ("train", "val", "test") or any(part.startswith(".") for part in parts):
        return False
    if not name.lower().endswith(IMAGE_ENDINGS):
        return False
    if len(parts) < 3:
        raise UserError(f"image '{name}' lies outside a class folder: move it to {parts[0]}/<class>/")
    return True


def _list_folder(root: Path, follow_links: bool) -> list[Entry]:
    """The images under a folder. Without `follow_links`, links to folders and those that lead out are left out."""
    entries, escaped = [], []
    inside = root.resolve()
    walked: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=follow_links):
        if follow_links:  # links may run in circles
            walked.add(os.path.realpath(folder))
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in walked]
        else:
            escaped += [f"{folder}/{name}" for name in folders if os.path.islink(os.path.join(folder, name))]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if not _wanted(name):
                continue
            if path.is_symlink() and not follow_links and not path.resolve().is_relative_to(inside):
                escaped.append(name)
                continue
            entries.append(Entry(name, path.stat().st_size, str(path), 0))
    if escaped:
        warnings.warn(
            f"'{root}': {len(escaped)} link(s) to folders or out of data.root were left out, the first is "
            f"'{escaped[0]}': set data.follow_links=true, copy the files in, or set data.root to where they are",
            stacklevel=2,
        )
    return entries


SOURCES: dict[str, Kind] = {
    "digits": Kind(_digits, needs_root=False),
    "idx": Kind(_idx),
    "folder": Kind(_folder),
    "imagenet": Kind(imagenet.open_imagenet, sizes=imagenet.SIZES),
    "shards": Kind(None),
}
