"""ImageNet (ILSVRC 2012) from its original files, which lie in one folder:

- train: ILSVRC2012_img_train.tar, a tar of n01440764.tar and so on; or folders train/n01440764; or tars
  train/n01440764.tar (both also without `train/`)
- val, which counts as our `test`: ILSVRC2012_img_val.tar; or files val/ILSVRC2012_val_00000001.JPEG; or folders
  val/n01440764
- labels of val, unless in class folders: ILSVRC2012_devkit_t12, .tar.gz or unpacked; or val.txt (see `devkit`)

Classes are numbered by sorted wnid, or by data.class_index. Tars are read in place. The type of an image is found by
its content, so that CMYK JPEGs and n02105855_2933.JPEG, which is a PNG, are good images.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.base.names import few
from pipeline.data.devkit import WNID, Devkit, ValList, read_devkit, read_list
from pipeline.data.parts import IMAGE_ENDINGS, Entry, Part, Sizes, Source, read_class_index, tar_files
from pipeline.settings.data import Data

TRAIN, VAL, LIST = "ILSVRC2012_img_train", "ILSVRC2012_img_val", "val.txt"
SIZES = Sizes(train=1_281_167, test=50_000, classes=1000)
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.IGNORECASE)


@dataclass(frozen=True)
class _Classes:
    """Titles by class number, the class number of each wnid, and which file says so."""

    titles: tuple[str, ...]
    numbers: dict[str, int]
    where: str


def open_imagenet(config: Data, seed: int) -> Source:
    """The source in data.root. Raises UserError for missing classes, torn tars and labels that do not fit."""
    assert config.root is not None
    root = storage.local_path(config.root)
    if not root.is_dir():
        raise UserError(f"data.root='{config.root}' is not a folder: set it to the one that holds {TRAIN}.tar")
    kit = read_devkit(root)
    train = _train(root)
    classes = _class_numbers(config, kit, train, root)
    labels = [classes.numbers[wnid] for wnid, entries in sorted(train.items()) for _ in entries]
    images = [entry for _, entries in sorted(train.items()) for entry in entries]
    test = sorted(_val(root, kit, classes), key=lambda item: item[1].name)
    facts = "\n".join(f"{entry.name} {entry.size}" for entry in (*images, *(entry for _, entry in test)))
    return Source(
        classes.titles,
        len(classes.titles),
        _part(labels, images),
        _part([label for label, _ in test], [entry for _, entry in test]),
        hashlib.sha256(facts.encode()).hexdigest(),
    )


def _part(labels: list[int], entries: list[Entry]) -> Part:
    return Part(np.array(labels, np.int64), tuple(entry.name for entry in entries), lambda i: entries[i])


def _class_numbers(config: Data, kit: Devkit | None, train: dict[str, list[Entry]], root: Path) -> _Classes:
    """The classes by the class index, the devkit or train, in this order. UserError unless train has just these."""
    if config.class_index is not None:
        classes = _Classes(*read_class_index(config.class_index), f"data.class_index='{config.class_index}'")
        if kit is not None and kit.titles.keys() != classes.numbers.keys():
            differ = sorted(kit.titles.keys() ^ classes.numbers.keys())
            raise UserError(f"{classes.where} and '{kit.where}' list other classes ({few(differ, 3)}): leave one out")
    else:
        wnids = sorted(kit.titles if kit else train)
        titles = tuple(kit.titles[wnid] for wnid in wnids) if kit else tuple(wnids)
        where = f"'{kit.where}'" if kit else f"train in '{root}'"
        classes = _Classes(titles, {wnid: number for number, wnid in enumerate(wnids)}, where)
    missing = sorted(classes.numbers.keys() - {wnid for wnid, entries in train.items() if entries})
    if missing:
        raise UserError(
            f"'{root}': train has no images of {len(missing)} of the {len(classes.numbers)} classes of "
            f"{classes.where}: {few(missing)}; fetch them, or read a subset with data.source=folder"
        )
    unknown = sorted(train.keys() - classes.numbers.keys())
    if unknown:
        raise UserError(f"'{root}': train has wnids that {classes.where} does not know: {few(unknown)}; remove them")
    if kit is not None:
        fewer = [f"{w} {len(e)} of {kit.train_images[w]}" for w, e in train.items() if len(e) < kit.train_images[w]]
        if fewer:
            warnings.warn(f"'{root}': train lacks images that '{kit.where}' counts: {few(fewer)}", stacklevel=2)
    return classes


def _train(root: Path) -> dict[str, list[Entry]]:
    """The train images by wnid, sorted by name. Empty classes keep their wnid."""
    packed = root / f"{TRAIN}.tar"
    if packed.is_file():
        inner = list(tar_files(str(packed), lambda name: name.endswith(".tar")))
        found = [(e.name, _tar_images(e.url, e.start, e.start + e.size, f"{packed}: {e.name}")) for e in inner]
    else:
        folder = next((root / name for name in ("train", TRAIN) if (root / name).is_dir()), root)
        found = [
            (child.name, _folder_images(child, root) if child.is_dir() else _tar_images(str(child)))
            for child in _children(folder, root)
            if (child.is_dir() or child.suffix == ".tar") and (folder != root or WNID.fullmatch(child.stem))
        ]
    train: dict[str, list[Entry]] = {}
    for name, entries in found:
        wnid = name.rpartition("/")[2].removesuffix(".tar")
        if not WNID.fullmatch(wnid):
            raise UserError(f"'{root}': '{name}' among the train classes is not a wnid such as n01440764: remove it")
        if wnid in train:
            raise UserError(f"'{root}': train has {wnid} twice, as a folder and as a tar: remove one of them")
        train[wnid] = _renamed(entries, f"train/{wnid}")
    if not train:
        raise UserError(
            f"data.root='{root}' has no train images: it needs {TRAIN}.tar (a tar of n01440764.tar, ...), or the class "
            "folders or class tars in train/"
        )
    return train


def _val(root: Path, kit: Devkit | None, classes: _Classes) -> list[tuple[int, Entry]]:
    """The val images, each with its class number."""
    packed = root / f"{VAL}.tar"
    folder = next((root / name for name in ("val", VAL) if (root / name).is_dir()), None)
    if packed.is_file():
        where, flat = packed, _tar_images(str(packed))
    elif folder is not None:
        where, flat = folder, _folder_images(folder, root)
        in_folders = [child for child in _children(folder, root) if child.is_dir()]
        if in_folders and flat:
            raise UserError(f"'{folder}' has both class folders and loose images ({flat[0].name}): use one of the two")
        if in_folders:
            return _val_in_folders(in_folders, root, kit, classes)
    else:
        raise UserError(f"data.root='{root}' has no val images: it needs {VAL}.tar, or the images in val/")
    images = _renamed(flat, "val")
    if kit is not None:
        labels: dict[str, int] | dict[str, str] = _by_devkit(images, where, kit)
        source = kit.where
    elif (root / LIST).is_file():
        listed = read_list(root / LIST)
        labels, source = _by_list(images, where, listed), listed.where
    else:
        raise UserError(
            f"'{where}' has no labels: add ILSVRC2012_devkit_t12.tar.gz to '{root}', or {LIST} with a line "
            "'ILSVRC2012_val_00000001.JPEG 65' for each image"
        )
    return [(_class_number(labels[_base(e)], e.name, source, classes), e) for e in images]


def _val_in_folders(folders: list[Path], root: Path, kit: Devkit | None, classes: _Classes) -> list[tuple[int, Entry]]:
    found = [
        (_class_number(folder.name, f"val/{folder.name}", str(root), classes), entry)
        for folder in folders
        for entry in _renamed(_folder_images(folder, root), "val")
    ]
    if not found:
        raise UserError(f"'{folders[0].parent}' has class folders but no images: fetch them again")
    truth = _by_devkit([entry for _, entry in found], folders[0].parent, kit) if kit else {}
    wrong = [entry for label, entry in found if truth and classes.numbers[truth[_base(entry)]] != label]
    if wrong:
        raise UserError(f"'{wrong[0].url}' lies in another class folder than the ground truth of val says: move it")
    return found


def _by_devkit(images: list[Entry], where: Path, kit: Devkit) -> dict[str, str]:
    """The wnid of each image, by the number in its name. UserError unless they are 1..n, n lines of ground truth."""
    numbers: dict[int, Entry] = {}
    for entry in images:
        match = _VAL_NAME.fullmatch(_base(entry))
        if match is None:
            raise UserError(f"'{where}': '{_base(entry)}' is not named as ILSVRC2012_val_00000001.JPEG: remove it")
        numbers[int(match[1])] = entry
    wanted = range(1, len(kit.truth) + 1)
    if len(images) != len(kit.truth) or numbers.keys() != set(wanted):
        missing = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in wanted if n not in numbers]
        detail = f"; missing: {few(missing, 3)}" if missing else ""
        raise UserError(
            f"'{where}' has {len(images)} images, but '{kit.where}' has {len(kit.truth)} lines of ground truth"
            f"{detail}; fetch what is not whole again"
        )
    return {_base(entry): kit.truth[number - 1] for number, entry in numbers.items()}


def _by_list(images: list[Entry], where: Path, listed: ValList) -> dict[str, int] | dict[str, str]:
    names = {_base(entry) for entry in images}
    missing, extra = sorted(listed.labels.keys() - names), sorted(names - listed.labels.keys())
    if missing or extra:
        detail = f"not there: {few(missing, 3)}" if missing else f"not listed: {few(extra, 3)}"
        raise UserError(
            f"'{where}' has {len(images)} images, but '{listed.where}' lists {len(listed.labels)}; {detail}; fetch the "
            "images again, or mend the list"
        )
    return listed.labels


def _class_number(label: int | str, image: str, where: str, classes: _Classes) -> int:
    """The class number of a label that is one already, or a wnid. UserError for an unknown one."""
    if isinstance(label, int):
        if label < len(classes.titles):
            return label
        raise UserError(
            f"'{where}' gives '{image}' the class number {label}, but {classes.where} has {len(classes.titles)} "
            f"classes, 0..{len(classes.titles) - 1} in the order of wnids: mend the list"
        )
    if label not in classes.numbers:
        raise UserError(f"'{where}' gives '{image}' the wnid '{label}', unknown to {classes.where}: mend or remove it")
    return classes.numbers[label]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS) and not any(part.startswith(".") for part in name.split("/"))


def _tar_images(url: str, start: int = 0, stop: int | None = None, title: str | None = None) -> list[Entry]:
    return list(tar_files(url, _is_image, start, stop, title))


def _folder_images(folder: Path, root: Path) -> list[Entry]:
    """The images directly in a folder."""
    found = []
    with os.scandir(folder) as listing:
        for item in listing:
            if _is_image(item.name) and item.is_file():
                if item.is_symlink():
                    _check_inside(Path(item.path), root)
                found.append(Entry(item.name, item.stat().st_size, item.path, 0))
    return found


def _children(folder: Path, root: Path) -> list[Path]:
    """What lies in a folder, sorted, hidden names left out. UserError for a link that leads out of data.root."""
    children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    for child in children:
        if child.is_symlink() and (child.is_dir() or child.suffix == ".tar"):
            _check_inside(child, root)
    return children


def _check_inside(path: Path, root: Path) -> None:
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserError(f"'{path}' is a link out of data.root='{root}': copy the files in, or move data.root")


def _base(entry: Entry) -> str:
    return entry.name.rpartition("/")[2]


def _renamed(entries: Iterable[Entry], folder: str) -> list[Entry]:
    """The entries as `folder/file`, wherever they come from, sorted: every layout gives the same shards."""
    named = [Entry(f"{folder}/{_base(entry)}", entry.size, entry.url, entry.start) for entry in entries]
    named.sort(key=lambda entry: entry.name)
    twice = [name for name, count in Counter(entry.name for entry in named).items() if count > 1]
    if twice:
        raise UserError(f"'{named[0].url}' holds '{twice[0]}' twice: remove one, or fetch it again")
    return named
