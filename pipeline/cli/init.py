"""`secateur init`: a config of one's own, with comments, from a few answers and a look at the images."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import shards, sources
from pipeline.data.manifest import IMAGES
from pipeline.data.stream import read_members
from pipeline.network.build import build_network
from pipeline.rounds import preflight
from pipeline.settings.config import parse_config
from pipeline.settings.data import Data
from pipeline.settings.yaml_file import read_tree

SCHEMA = Path(__file__).parents[1] / "settings" / "schema.json"
LOOKS = 24  # images that are opened to learn their sizes
SMALL = 64  # pixels; images up to this are taken as they are
LARGE = (256, 224)  # pixels of the short side, and of the crop, of larger ones
LANES = 8
NETWORKS = {"lenet_300_100", "lenet_5", "alexnet_caffe", "vgg_16"}
NO_LOSS = "no-loss"


@dataclass(frozen=True)
class Answers:
    """What was said on the command line; None is asked for, where somebody is there to answer, or chosen."""

    data: str | None = None
    network: str | None = None
    target: str | None = None
    checkpoint: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class Found:
    """What the data are: `pixels` is the short side of a typical image, `train` how many there are to train on."""

    source: str
    root: str | None
    channels: int
    pixels: int
    train: int
    classes: int


def write(given: Answers, out: Path) -> None:
    """Write a config that runs, and say what comes next. Raises UserError for an answer that will not do."""
    if out.exists():
        raise UserError(f"--out {out} exists already: name another file, or remove it")
    given = asked(given)
    assert given.data is not None
    found = look(given.data)
    text = make(given, found, name(out))
    check(text, out, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}: {found.train:,} train images of {found.classes} classes")
    print(f"next: secateur plan {out}, then secateur run {out}")


def asked(given: Answers) -> Answers:
    """The answers, what is missing asked on a terminal. Raises UserError where nobody is there to ask."""
    if given.data is None and not sys.stdin.isatty():
        raise UserError("init needs --data PATH here: a folder with train/CLASS/*, a tar, shards, or digits")
    if not sys.stdin.isatty():
        return given

    def ask(question: str, default: str | None = None) -> str:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        return answer or (default if default is not None else ask(question))

    data = given.data or ask("where are the images (folder with train/CLASS/*, tar, shards, or digits)")
    network = given.network or ask("network (resnet18, or my_module:build)", "the one that suits the images")
    return replace(
        given,
        data=data,
        network=None if network.startswith("the one") else network,
        target=given.target or ask("how many times fewer weights, or no-loss", "8"),
    )


def look(data: str) -> Found:
    """Find out what the data are. Raises UserError where they are nothing that can be read."""
    if data == "digits":
        return _of_source(Data.model_validate({"source": "digits", "size": 8}), None)
    if storage.exists(storage.join(data, "manifest.json")):
        made = shards.load_manifest(data)
        first = itertools.islice(read_members([(storage.join(data, made.splits["train"][0].name), 0, None)]), LOOKS)
        stored = [next((sample[suffix] for suffix in IMAGES if suffix in sample), b"") for sample in first]
        channels, pixels = _seen(stored, data)
        return Found("shards", _whole(data), channels, pixels, made.sizes["train"], made.num_classes)
    local = storage.local_path(data)
    kind = "folder"
    if local.is_dir():
        names = {entry.name for entry in local.iterdir()}
        if any(each.startswith("train-images-idx3-ubyte") for each in names):
            kind = "idx"
        elif "train" not in names and any(each.startswith("ILSVRC2012") for each in names):
            kind = "imagenet"
    return _of_source(Data.model_validate({"source": kind, "root": data}), str(local.absolute()))


def _of_source(settings: Data, root: str | None) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a source warns of is said when the config is used
        source = sources.open_source(settings, 0)
    train = len(source.train.labels)
    if not train:
        raise UserError(f"--data {root}: holds no train images")
    numbers = np.linspace(0, train - 1, min(LOOKS, train)).astype(int).tolist()
    channels, pixels = _seen([source.train.read(number) for number in numbers], root)
    held = 0 if source.val is not None else math.ceil(0.1 * train)
    return Found(settings.source, root, channels, pixels, train - held, source.num_classes)


def _seen(stored: list[bytes], root: str | None) -> tuple[int, int]:
    """Channels of images, and the short side of a typical one. Raises UserError where none of them can be read."""
    sides, channels = [], 1
    for data in stored:
        try:
            with Image.open(io.BytesIO(data)) as image:
                sides.append(min(image.size))
                channels = channels if image.mode in ("1", "L", "I;16", "LA") else 3
        except (UnidentifiedImageError, OSError):
            continue  # a run counts unreadable images, and says so
    if not sides:
        raise UserError(f"--data {root}: none of {len(stored)} train images can be read")
    return channels, int(statistics.median(sides))


def _whole(place: str) -> str:
    """A path made absolute; a URL as it is."""
    return str(storage.local_path(place).absolute()) if storage.is_local(place) else place


def make(given: Answers, found: Found, run: str) -> str:
    """The text of the config."""
    small = found.pixels <= SMALL
    size = given.size or (found.pixels if small else LARGE[1])
    resize = size if small else round(size * LARGE[0] / LARGE[1])
    factory, kwargs = network(given, found, size)
    batch = min(128, max(LANES, 2 ** int(math.log2(max(1, found.train / 4))) // LANES * LANES))
    colours = ("[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]") if found.channels == 3 else ("[0.3]", "[0.35]")
    augment = f"[shift]\n  shift: {max(1, size // 14)}" if small else "[resized-crop, flip]"
    root = "" if found.root is None else f"\n  root: {_text(found.root)}"
    dense = "epochs: 0" if given.checkpoint else "epochs: 30"
    trained = f"\n  checkpoint: {_text(_whole(given.checkpoint))}" if given.checkpoint else ""
    return f"""\
# yaml-language-server: $schema={SCHEMA}
# Made by `secateur init`. `secateur plan FILE` shows what it would do, `secateur run FILE` does it.
name: {_text(run)}                          # the run's folder is runs/{run}
data:
  source: {found.source}{root}
  channels: {found.channels}                    # 1: grey, 3: colour
  resize: {resize}                    # short side of the decoded image, in pixels
  size: {size}                      # what the network sees, in pixels
  mean: {colours[0]}
  std: {colours[1]}
  augment: {augment}
model:
  factory: {_text(factory)}
  kwargs: {kwargs}{trained}
# The dense network that is pruned; epochs: 0 takes model.checkpoint as it is.
dense: {{{dense}, batch_size: {batch}, lr: {"0.01" if given.checkpoint else "0.05"}, weight_decay: 0.0005}}
# Each round prunes, and then trains what is left.
prune: {{allocation: pooled, schedule: geometric, rounds: 4}}
retrain: {{epochs: {5 if given.checkpoint else 10}, batch_size: {batch}, lr: 0.01, weight_decay: 0.0005}}
# margin: the drop in accuracy that would matter to you, 0.005 = 0.5 points.
target: {{{target(given.target or "8")}, margin: 0.005}}
"""


def network(given: Answers, found: Found, size: int) -> tuple[str, str]:
    """The factory, and its kwargs as YAML."""
    chosen = given.network or ("lenet_300_100" if size <= 16 else "torchvision.models.resnet18")
    if chosen not in NETWORKS and not re.search(r"[.:]", chosen):
        chosen = f"torchvision.models.{chosen}"
    return chosen, f"{{inputs: {found.channels * size * size}}}" if chosen == "lenet_300_100" else "{}"


def target(text: str) -> str:
    """The target as YAML. Raises UserError for what is neither a number of 1 or more nor no-loss."""
    if text == NO_LOSS:
        return "mode: no-loss"
    try:
        compression = float(text)
    except ValueError:
        compression = math.nan
    if not 1 <= compression < math.inf:
        raise UserError(f"--target {text}: give how many times fewer weights there are to be, as in 8, or {NO_LOSS}")
    return f"compression: {compression:g}"


def name(out: Path) -> str:
    """The run's name, from the file's."""
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-")
    return made[:100] or "my-network"


def check(text: str, out: Path, found: Found) -> None:
    """Raise UserError where the config could not run: its settings, and whether its network can be built."""
    with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
        file = Path(folder, "made.yaml")
        file.write_text(text, encoding="utf-8")
        config = parse_config(read_tree(file, []), origin=f"--out {out}")
    preflight.check_names(config)
    build_network(config.model, found.classes, config.seed)


def _text(value: str) -> str:
    """A text as YAML has it, in quotes where it needs them: 2024 would be a number, and yes a flag."""
    plain = re.fullmatch(r"[A-Za-z/][A-Za-z0-9_./:-]*", value) and not value.endswith(":")
    plain = plain and yaml.safe_load(value) == value
    return value if plain else "'" + value.replace("'", "''") + "'"
