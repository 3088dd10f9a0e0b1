"""ILSVRC 2012's development kit: the classes, and the label of every val image.

`data/meta.mat` lists the synsets as (ILSVRC2012_ID, WNID, words, ..., num_children, ..., num_train_images), inner nodes
of WordNet among them; the classes are those without children. `data/ILSVRC2012_validation_ground_truth.txt` has on line
n the ILSVRC2012_ID of val image n. That id is not the class number that networks are trained with, which counts the
sorted wnids from 0.
"""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import UserError
from pipeline.base.names import few

WNID = re.compile(r"n\d{8}")  # a WordNet id: n and eight digits

_NAME = "ILSVRC2012_devkit_t12"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_MOST = 64 * 2**20  # bytes; the kit's own files have less than 2 MB
_DAMAGE = (tarfile.TarError, zlib.error, EOFError, OSError)


@dataclass(frozen=True)
class Devkit:
    """`titles` and `train_images` (a count) by wnid, for the classes alone; `truth[n - 1]` is val image n's wnid."""

    where: str
    titles: dict[str, str]
    train_images: dict[str, int]
    truth: tuple[str, ...]


def read_devkit(root: Path) -> Devkit | None:
    """The kit in `root`, unpacked or as .tar or .tar.gz; None where there is none. Raises UserError if damaged."""
    found = next((p for p in (root / _NAME, root / f"{_NAME}.tar.gz", root / f"{_NAME}.tar") if p.exists()), None)
    if found is None:
        return None
    files = _unpacked(found) if found.is_dir() else _packed(found)
    for name in (_META, _TRUTH):
        if name not in files:
            raise UserError(f"'{found}' has no {name}: fetch {_NAME}.tar.gz again")
    rows = _synsets(files[_META], f"{found}: {_META}")
    wnids = {number: wnid for number, wnid, *_ in rows}
    if len(wnids) != len(rows) or len(set(wnids.values())) != len(rows):
        raise UserError(f"'{found}: {_META}' names an id or a wnid twice: fetch {_NAME}.tar.gz again")
    return Devkit(
        str(found),
        {wnid: title for _, wnid, title, _ in rows},
        {wnid: images for _, wnid, _, images in rows},
        _truth(files[_TRUTH], wnids, f"{found}: {_TRUTH}"),
    )


def _unpacked(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (_META, _TRUTH) if (folder / name).is_file()}


def _packed(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = next((name for name in (_META, _TRUTH) if f"/{member.name}".endswith(f"/{name}")), None)
                if name is None or not member.isreg():
                    continue
                if member.size > _MOST:
                    raise UserError(f"'{path}': {member.name} says that it has {member.size} bytes: fetch it again")
                stream = archive.extractfile(member)
                assert stream is not None
                files[name] = stream.read()
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{path}' is damaged or cut short ({reason}): fetch it again") from error
    return files


def _synsets(data: bytes, where: str) -> list[tuple[int, str, str, int]]:
    """Id, wnid, title and number of train images of each class (a synset without children)."""
    from scipy.io import loadmat

    try:
        table = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True, variable_names=["synsets"])["synsets"])
        return [_row(row) for row in table if int(row["num_children"]) == 0]
    except Exception as error:  # a damaged file fails in any way; none of them is worth a traceback
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{where}' is not the kit's list of synsets ({reason}): fetch {_NAME} again") from error


def _row(row: Any) -> tuple[int, str, str, int]:
    wnid = str(row["WNID"])
    if not WNID.fullmatch(wnid):
        raise ValueError(f"'{wnid}' is not a wnid")
    # "tench, Tinca tinca": the first word names the class.
    return int(row["ILSVRC2012_ID"]), wnid, str(row["words"]).split(",")[0], int(row["num_train_images"])


def _truth(data: bytes, wnids: dict[int, str], where: str) -> tuple[str, ...]:
    lines = data.decode("utf-8", errors="replace").split()
    unknown = [f"'{text}' on line {n}" for n, text in enumerate(lines, 1) if _number(text) not in wnids]
    if unknown or not lines:
        raise UserError(
            f"'{where}' has ids that meta.mat gives to no class: {few(unknown, 3) or 'it is empty'}; fetch both again, "
            f"from one {_NAME}.tar.gz"
        )
    return tuple(wnids[int(text)] for text in lines)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


@dataclass(frozen=True)
class ValList:
    """A plain list of val images: class number, or wnid, by file name."""

    where: str
    labels: dict[str, int] | dict[str, str]


def read_list(path: Path) -> ValList:
    """A list of lines "ILSVRC2012_val_00000001.JPEG 65" (class numbers, as Caffe's) or "... n01751748" (wnids).

    The first label tells which of the two forms the list has. Raises UserError for a line of neither form, a mix, or a
    name twice.
    """
    labels: dict[str, str] = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or not (_number(fields[1]) >= 0 or WNID.fullmatch(fields[1])):
            raise UserError(
                f"'{path}', line {number}: '{line[:80]}' is neither 'ILSVRC2012_val_00000001.JPEG 65' (a class number "
                "from 0) nor '... n01751748' (a wnid): mend the list"
            )
        name = fields[0].rpartition("/")[2]
        if name in labels:
            raise UserError(f"'{path}', line {number}: '{name}' stands twice: mend the list")
        labels[name] = fields[1]
    by_number = [name for name, label in labels.items() if label.isdigit()]
    if not by_number:
        return ValList(str(path), labels)
    if len(by_number) < len(labels):
        other = next(name for name, label in labels.items() if not label.isdigit())
        raise UserError(
            f"'{path}' has a class number for '{by_number[0]}' but a wnid for '{other}': use one of the two"
        )
    return ValList(str(path), {name: int(label) for name, label in labels.items()})
