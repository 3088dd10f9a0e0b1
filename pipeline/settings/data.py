"""Settings of the data: where images come from and how they become batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.settings.base import Bytes, Count, Fraction, Positive, Section, Text

Decoder = Literal["turbo", "pillow"]


class Data(Section):
    """Where images come from and how they become batches."""

    source: Text = Field(
        "digits",
        description="digits: scikit-learn's 1,797 real digits, nothing to download; idx: files of the MNIST family, "
        ".gz or not; folder: train/<class>/* and test/<class>/*, a folder or one tar. A val/ beside test/ is val. "
        "Without test/, val/ is used as test, as in ImageNet. What is then missing is cut from train (val_fraction, "
        "test_fraction); imagenet: a folder of ILSVRC 2012's original tars, unpacked or not, whose val is used as "
        "test; shards: WebDataset shards with a manifest.json (`secateur shards build` or `index`).",
    )
    root: Text | None = Field(None, description="Folder, tar or URL that the source reads; not used by digits.")
    classes: Annotated[int, Field(ge=1, le=10**6)] | None = Field(
        None, description="Number of classes; by default what the source holds."
    )
    class_index: Text | None = Field(
        None,
        description="JSON file {index: [folder name, title]} that numbers class folders, as ImageNet's does; by "
        "default they are in alphabetical order. A checkpoint needs the order that it was trained with.",
    )
    label: Text = Field("cls", description="Where a foreign shard keeps the label: cls, or the name of a json field.")
    channels: Literal[1, 3] = Field(1, description="1 reads every image as greyscale, 3 as RGB.")
    resize: Positive | None = Field(None, description="Short side, in pixels, that images are scaled to when decoded.")
    decoder: Decoder = Field(
        "turbo",
        description="How JPEGs become pixels. turbo: simplejpeg and torch; larger images are decoded at a half, a "
        "quarter or an eighth where `resize` allows, and resized-crop cuts from that, without resizing twice. pillow: "
        "Pillow alone. Other images are decoded by Pillow either way.",
    )
    size: Annotated[int, Field(ge=1, le=8192)] = Field(
        28, description="Height and width, in pixels, of the network's input (centre crop)."
    )
    mean: tuple[float, ...] = Field((0.0,), description="Per channel, subtracted after scaling pixels to 0..1.")
    std: tuple[float, ...] = Field((1.0,), description="Per channel, the divisor after the mean is subtracted.")
    augment: tuple[Literal["shift", "crop", "resized-crop", "flip"], ...] = Field(
        (),
        description="Training only, drawn from (seed, epoch, sample). shift: move by up to `shift` pixels, zeros fill "
        "in; crop: a random window of `size`; resized-crop: area 8-100%, aspect 3/4-4/3; flip: left-right.",
    )
    shift: Count = Field(2, description="Largest move of the `shift` augmentation, in pixels.")
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1,
        description="Share of train held out as val, drawn by seed and stratified by class, where the data has no val "
        "part of its own (in a folder: val/ beside test/).",
    )
    test_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.2, description="Share held out as test where there is no test part: digits, a folder with train/ alone."
    )
    follow_links: bool = Field(False, description="folder: follow links to folders, and to files outside of data.root.")
    shard_samples: Positive = Field(5000, description="Samples in a shard that `shards build` writes.")
    build_workers: Positive | None = Field(
        None, description="Processes that write shards; by default one for each core. The shards are the same."
    )
    shrink: Positive | None = Field(
        None, description="Short side, in pixels, that `shards build` scales larger images down to, as JPEG."
    )
    quality: Annotated[int, Field(ge=1, le=100)] = Field(90, description="JPEG quality of the images `shrink` writes.")
    lanes: Annotated[int, Field(ge=1, le=2**16)] = Field(
        8,
        description="Number of parallel streams that an epoch is split into, at least as many as workers. The order of "
        "samples depends on it, never on the number of workers.",
    )
    shuffle_bytes: Bytes = Field(
        16 * 2**20, description="Memory of a lane's shuffle window: how far a sample can move from its stored place."
    )
    cache_bytes: Annotated[int, Field(ge=0, le=2**60)] = Field(
        2**30,
        description="A split whose decoded images fit is decoded once and kept in memory; a larger one is streamed. "
        "The order of samples is the same.",
    )
    cache_dir: Text | None = Field(
        None, description="Folder on each node's own disk that keeps shards read from a URL; by default none is kept."
    )
    cache_disk_bytes: Bytes = Field(
        50 * 2**30, description="Size of data.cache_dir on each node; the shards used longest ago are removed."
    )
    decoded_cache: Text | None = Field(
        None,
        description="Folder on each node's own disk that keeps decoded images, for networks that are faster than any "
        "decoder; by default none are kept. A split that fits data.cache_bytes lies in memory instead.",
    )
    decoded_cache_bytes: Bytes = Field(
        200 * 2**30, description="Size of data.decoded_cache on each node; what was used longest ago is removed."
    )
    decode_threads: Annotated[int, Field(ge=1, le=1024)] = Field(
        2, description="Threads that decode images in each process."
    )
    eval_batch: Positive = Field(250, description="Samples a forward pass takes in evaluation.")
    max_bad_fraction: Fraction = Field(0.01, description="More unreadable images than this share stops the run.")

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if len(self.mean) not in (1, self.channels) or len(self.std) not in (1, self.channels):
            raise ValueError(f"mean and std take 1 or {self.channels} numbers, one a channel")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize={self.resize} is smaller than size={self.size}: the crop would not fit")
        if "shift" in self.augment and self.shift > self.size:
            raise ValueError(f"shift={self.shift} moves an image of size={self.size} out of sight: lower it")
        if self.shrink is not None and self.shrink < (self.resize or self.size):
            raise ValueError(
                f"shrink={self.shrink} is smaller than resize (or size), {self.resize or self.size}: images would be "
                "blurred, raise it"
            )
        return self
