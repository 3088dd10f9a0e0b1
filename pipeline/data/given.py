"""Data sets that a Python program gives as objects, written once as shards.

A run reads its data by content and order, in other processes and again after it was stopped. So every image is read
once, in the data set's own order, and written as PNG into shards that lie in a folder named after their content.
"""

from __future__ import annotations

import hashlib
import io
import operator
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.spread import Spread, here
from pipeline.data import shards, sources
from pipeline.data.decoder import upper_half
from pipeline.data.manifest import MOST_CLASSES
from pipeline.data.parts import Entry, Part, Source
from pipeline.settings.data import Data

FOLDER = "_data"  # under runs_dir; no run can have this name
TWICE = 8  # samples that are read twice, to see whether a data set gives the same image each time
_GREY = ("L", "1", "LA")
_AS_PNG = ("L", "1", "LA", "P", "RGB", "RGBA")


@dataclass(frozen=True)
class Written:
    """Where the shards lie, the channels of the images, and the height and width that all of them have, if they do."""

    root: str
    channels: int
    size: int | None


def write(
    sets: Mapping[str, Any], runs_dir: str, config: Data, seed: int, progress: shards.Progress, spread: Spread = here
) -> Written:
    """Write the data sets `train`, `val` and `test` as shards, unless they are there; where they lie.

    A set is map-style (`len(set)`, `set[i]`), or iterable. A sample is a pair (image, label), or a mapping with the
    keys image and label. An image is a PIL image; a uint8 tensor (C, H, W) or (H, W); a uint8 array (H, W, C) or
    (H, W); or a float tensor or array of these shapes with values in 0..1, which are rounded to 8 bits. A label is the
    class's number, from 0. Without `val`, or `test`, data.val_fraction, or data.test_fraction, of train is held out by
    `seed`.

    Raises UserError that names the set and the sample.
    """
    if sets.get("train") is None:
        raise UserError("train is missing: give the data set to train on, or the folder of your shards")
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        read = {
            name: _read(name, given, Path(folder, name), progress) for name, given in sets.items() if given is not None
        }
        source = _source(read, sets["train"], config, seed)
        root = storage.join(runs_dir, FOLDER, shards.identity(config, seed, source)[:16])
        shards.build_from(source, config, seed, root, progress, spread)
    sizes = {size for each in read.values() for size in each.sizes}
    height, width = sizes.pop() if len(sizes) == 1 else (0, 1)
    grey = all(each.grey for each in read.values())
    return Written(root, 1 if grey else 3, height if height == width else None)


@dataclass
class _Read:
    """What was read of a set: its samples, in a file of PNGs one after the other."""

    part: Part
    fingerprint: str
    grey: bool
    sizes: set[tuple[int, int]]


def _source(read: dict[str, _Read], train: Any, config: Data, seed: int) -> Source:
    """What the shards are built from."""
    found = 1 + max(int(each.part.labels.max()) for each in read.values())
    if config.classes is not None and config.classes < found:
        raise UserError(f"data.classes={config.classes}, and the data sets hold the label {found - 1}: raise it")
    number = config.classes or found
    titles = getattr(train, "classes", None)
    named = isinstance(titles, list | tuple) and len(titles) == number and all(isinstance(t, str) for t in titles)
    classes = tuple(titles) if named and titles else tuple(map(str, range(number)))
    text = " ".join(f"{name}={each.fingerprint}" for name, each in read.items())
    if "test" in read:
        parts = read["train"].part, read["test"].part
    else:
        parts = sources.held_out(read["train"].part, config.test_fraction, seed)
        text += f" test={config.test_fraction}"
    return Source(classes, number, *parts, text, read["val"].part if "val" in read else None)


def _read(name: str, given: Any, file: Path, progress: shards.Progress) -> _Read:
    """Read a set to its end. Raises UserError for what is no data set of images and labels."""
    count = _require_steady(name, given) if _is_map(given) else None
    labels, entries, sizes, grey, digest = list[int](), list[Entry](), set[tuple[int, int]](), True, hashlib.sha256()
    with file.open("wb") as stream:
        for number, sample in enumerate(_samples(name, given)):
            where = f"sample {number} of {name}"
            image, label = _pair(sample, where)
            labels.append(_label(label, where))
            picture = _picture(image, where)
            data = _png(picture)
            grey = grey and picture.mode in _GREY
            if len(sizes) < 2:
                sizes.add((picture.height, picture.width))
            entries.append(Entry("", len(data), str(file), stream.tell()))
            stream.write(data)
            digest.update(hashlib.sha256(data).digest() + labels[-1].to_bytes(8, "little"))
            if count is not None:
                progress(f"reading {name}", number + 1, count)
    if not entries:
        raise UserError(f"{name} is empty: give a data set with images")
    part = Part(np.array(labels, np.int64), ("",) * len(labels), entries.__getitem__)
    return _Read(part, digest.hexdigest(), grey, sizes)


def _is_map(given: Any) -> bool:
    return hasattr(given, "__getitem__") and hasattr(given, "__len__")


def _samples(name: str, given: Any) -> Iterator[Any]:
    if _is_map(given):
        return (given[number] for number in range(len(given)))
    if hasattr(given, "__iter__"):
        return iter(given)
    raise UserError(
        f"{name} is a {type(given).__name__}, not a data set: give one with len() and [i], an iterable of "
        "(image, label), or the folder of your shards"
    )


def _require_steady(name: str, given: Any) -> int:
    """The number of samples. Raises UserError where a sample is another image when it is read again."""
    for number in range(min(TWICE, len(given))):
        where = f"sample {number} of {name}"
        first, second = (_png(_picture(_pair(given[number], where)[0], where)) for _ in range(2))
        if first != second:
            raise UserError(
                f"{where} is another image each time that it is read, so it has a random transform: leave that out, "
                "and set data.augment (shift, crop, resized-crop, flip) for training"
            )
    return len(given)


def _pair(sample: Any, where: str) -> tuple[Any, Any]:
    if isinstance(sample, Mapping) and "image" in sample and "label" in sample:
        return sample["image"], sample["label"]
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    keys = f" with the keys {', '.join(map(str, list(sample)[:5]))}" if isinstance(sample, Mapping) else ""
    raise UserError(
        f"{where} is a {type(sample).__name__}{keys}: give pairs (image, label), or mappings with the keys image and "
        "label"
    )


def _label(label: Any, where: str) -> int:
    try:
        plain: Any = label.item() if isinstance(label, Tensor | np.generic | np.ndarray) else label
        number = operator.index(plain)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(label.shape)}" if hasattr(label, "shape") else ""
        batch = ": give the data set itself, not its DataLoader" if shape and len(label.shape) else ""
        remedy = batch or ": give whole numbers, which count classes from 0"
        raise UserError(
            f"{where}: its label is a {type(label).__name__}{shape}, not the number of a class{remedy}"
        ) from error
    if not 0 <= number < MOST_CLASSES:
        raise UserError(f"{where}: its label is {number}; labels count classes from 0")
    return number


def _picture(image: Any, where: str) -> Image.Image:
    """An image as Pillow has it. Raises UserError for another shape or type, or values that are no pixels."""
    if isinstance(image, Image.Image):
        if image.mode.startswith("I"):
            return upper_half(image)
        return image if image.mode in _AS_PNG else image.convert("RGB")
    if not isinstance(image, Tensor | np.ndarray):
        raise UserError(f"{where}: its image is a {type(image).__name__}: give a PIL image, a tensor or an array")
    shape = tuple(image.shape)
    if isinstance(image, np.ndarray):
        array = image
    else:
        planes = image.detach().cpu()
        planes = planes.float() if planes.is_floating_point() else planes
        array = (planes.permute(1, 2, 0) if planes.ndim == 3 else planes).numpy()
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        order = "(C, H, W)" if isinstance(image, Tensor) else "(H, W, C)"
        raise UserError(f"{where}: its image has the shape {shape}: give {order} with 1 or 3 channels, or (H, W)")
    return Image.fromarray(np.ascontiguousarray(_bytes(array, image.dtype, where)))


def _bytes(array: np.ndarray[Any, Any], dtype: Any, where: str) -> np.ndarray[Any, Any]:
    """Pixels as uint8; numbers in 0..1 are brought to 0..255 and rounded."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f":
        raise UserError(f"{where}: its image is of {dtype}: give uint8, or floating point in 0..1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        raise UserError(
            f"{where}: its image has values from {low:.3g} to {high:.3g}, and pixels lie in 0..1: leave a "
            "normalisation out of the data set, and set data.mean and data.std"
        )
    return np.rint(array.astype(np.float64) * 255).astype(np.uint8)


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
