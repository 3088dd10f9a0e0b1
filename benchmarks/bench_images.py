"""From a JPEG of ImageNet to the network's input: random-resized crop to 224 and flip, in images a second.

    SECATEUR_DATA=... python benchmarks/bench_images.py

First one core: ours, torchvision's two ways, and the bare decoding of the whole image, which is a limit for whoever
decodes all of it. Then the whole loader from shards, against stock WebDataset with torchvision in as many workers.
All ways take turns in one process; medians. Last, how far ours is from Pillow, in pixels.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from pipeline.data import decoder, images, shards
from pipeline.data.loader import TrainLoader, open_split
from pipeline.settings.config import parse_config
from pipeline.settings.data import Data

SIZE, TURNS = 224, 7
COPIES = 16  # of each image in the shards, so that a loader runs for seconds
BATCH = 48
CONFIG = Data(channels=3, size=SIZE, augment=("resized-crop", "flip"))


def main() -> None:
    folder = os.environ.get("SECATEUR_DATA", "")
    if not Path(folder, "imagenet-sample-125.tar").is_file():
        sys.exit("imagenet-sample-125.tar is not here: set SECATEUR_DATA to the folder of real data")
    torch.set_num_threads(1)
    files = read(Path(folder, "imagenet-sample-125.tar"))
    console = Console(width=120)
    console.print(one_core(files))
    with tempfile.TemporaryDirectory() as root:
        console.print(loaders(files, root))
    console.print(differences(files))


def read(path: Path) -> list[bytes]:
    """The JPEGs in a tar."""
    with tarfile.open(path) as archive:
        members = [member for member in archive if member.name.lower().endswith((".jpg", ".jpeg"))]
        return [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]


def ours(how: decoder.Decoder, files: list[bytes]) -> None:
    """As Split.batch does it, with the images of one batch."""
    config = CONFIG.model_copy(update={"decoder": how})
    draws = np.random.default_rng(0).random((len(files), images.DRAWS))
    batch = np.zeros((len(files), SIZE, SIZE, 3), np.uint8)
    for number, data in enumerate(files):
        canvas = decoder.decode(data, 3, None, how, cropped=True)
        batch[number] = images.window(canvas, config, draws[number])
    images.finish(batch, config, draws)


def by_torchvision_and_pillow(files: list[bytes]) -> None:
    change = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    torch.stack([change(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])


def by_torchvision(files: list[bytes]) -> None:
    change = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip()])
    torch.stack([change(decode_jpeg(tensor(data), ImageReadMode.RGB)) for data in files])


def tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def bare(files: list[bytes]) -> None:
    for data in files:
        simplejpeg.decode_jpeg(data, "RGB")


def one_core(files: list[bytes]) -> Table:
    """Images a second of each way, and as a ratio to torchvision on Pillow and to the bare decoding."""
    readable = [data for data in files if simplejpeg.decode_jpeg_header(data)[2] in ("Gray", "YCbCr", "RGB")]
    ways: dict[str, Callable[[list[bytes]], None]] = {
        "torchvision on Pillow": by_torchvision_and_pillow,
        "torchvision, decode_jpeg": by_torchvision,
        "bare decoding, whole image": bare,
        "ours, decoder=pillow": lambda data: ours("pillow", data),
        "ours, decoder=turbo": lambda data: ours("turbo", data),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, way in ways.items():
            began = time.perf_counter()
            way(readable)
            found[name].append(len(readable) / (time.perf_counter() - began))
    rates = {name: statistics.median(each) for name, each in found.items()}
    return rated(f"{len(readable)} images, one core", rates, "torchvision on Pillow", "bare decoding, whole image")


def rated(title: str, rates: dict[str, float], *against: str) -> Table:
    table = Table("", "images/s", *(f"x {name}" for name in against), title=title)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f}", *(f"{rate / rates[other]:.2f}" for other in against))
    return table


def loaders(files: list[bytes], root: str) -> Table:
    """A whole epoch from shards, with 1 and 2 threads, and with 1 and 2 worker processes of WebDataset's."""
    write(files, root)
    manifest, _ = shards.index(root, val_fraction=0.05)
    ways: dict[str, Callable[[], int]] = {}
    for workers in (1, 2):
        ways[f"WebDataset, {workers} processes"] = lambda workers=workers: stock(root, workers)
        ways[f"ours, {workers} threads"] = lambda workers=workers: epoch(root, manifest, workers)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            began = time.perf_counter()
            count = way()
            found[name].append(count / (time.perf_counter() - began))
    rates = {name: statistics.median(each) for name, each in found.items()}
    return rated("the whole loader", rates, "WebDataset, 1 processes", "ours, 1 threads")


def write(files: list[bytes], root: str) -> None:
    """The images as train and test shards."""
    for split, copies in (("train", COPIES), ("test", 1)):
        with webdataset.ShardWriter(f"{root}/{split}-%05d.tar", maxcount=500, verbose=0) as writer:
            for copy in range(copies):
                for number, data in enumerate(files):
                    writer.write({"__key__": f"{copy:03d}-{number:05d}", "jpg": data, "cls": number % 10})


def epoch(root: str, manifest: shards.Manifest, threads: int) -> int:
    data = {"source": "shards", "root": root, "channels": 3, "size": SIZE, "augment": ["resized-crop", "flip"]}
    config = parse_config({"name": "b", "data": {**data, "cache_bytes": 0, "lanes": 8, "decode_threads": threads}}).data
    split = open_split(config, root, manifest, "train")
    loader = TrainLoader(split, config, batch_size=BATCH, seed=0, rank=0, world=1)
    return sum(len(batch.labels) for batch in loader.epoch(0))


def stock(root: str, workers: int) -> int:
    change = v2.Compose([v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    urls = sorted(str(path) for path in Path(root).glob("train-*.tar"))
    made: Any = webdataset.WebDataset(urls, shardshuffle=100).shuffle(500).decode("pilrgb").to_tuple("jpg", "cls")
    made = made.map_tuple(change, int)
    return sum(len(labels) for _, labels in DataLoader(made, batch_size=BATCH, num_workers=workers))


def differences(files: list[bytes]) -> Table:
    """Of 255: what turbo gives from what Pillow gives, whole and with the short side brought to some lengths."""
    table = Table("short side", "images", "mean", "largest", title="turbo against Pillow, difference of pixels")
    for resize in (None, 256, 128, 64):
        each = [*pairs(files, resize)]
        table.add_row(
            str(resize or "as stored"), str(len(each)), f"{np.mean([one for one, _ in each]):.3f}",
            f"{max(most for _, most in each):.0f}",
        )  # fmt: skip
    return table


def pairs(files: list[bytes], resize: int | None) -> Iterator[tuple[float, float]]:
    for data in files:
        pillow, turbo = (decoder.decode(data, 3, resize, how).astype(int) for how in ("pillow", "turbo"))
        apart = np.abs(pillow - turbo)
        yield float(apart.mean()), float(apart.max())


if __name__ == "__main__":
    main()
