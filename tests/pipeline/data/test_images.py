"""Decoding and augmentation of real encoded bytes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import images
from pipeline.settings.data import Data


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int = 20, height: int = 10) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 12, columns * 12, rows * 0 + 40], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


def test_png_is_exact_and_channels_come_first():
    canvas = images.decode(encoded(gradient(), "PNG"), 3, None)
    assert canvas.shape == (3, 10, 20)
    assert canvas[:, 2, 5].tolist() == [24, 60, 40]
    assert canvas.dtype == np.uint8


def test_grey_of_a_colour_image_and_colour_of_a_grey_one():
    grey = images.decode(encoded(gradient(), "PNG"), 1, None)
    assert np.array_equal(grey[0], np.asarray(gradient().convert("L")))
    colour = images.decode(encoded(gradient().convert("L"), "JPEG", quality=95), 3, None)
    assert np.array_equal(colour[0], colour[2])


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (220, 30, 30))
    canvas = images.decode(encoded(red.convert("CMYK"), "JPEG", quality=95), 3, None)
    assert np.abs(canvas.mean(axis=(1, 2)) - [220, 30, 30]).max() < 8


def test_palette_alpha_one_bit_and_sixteen_bit_png():
    palette = encoded(gradient().quantize(8), "PNG", transparency=0)
    assert images.decode(palette, 3, None).shape == (3, 10, 20)
    alpha = Image.new("RGBA", (4, 4), (10, 20, 30, 128))
    assert images.decode(encoded(alpha, "PNG"), 3, None)[:, 0, 0].tolist() == [10, 20, 30]
    assert images.decode(encoded(Image.new("1", (4, 4), 1), "PNG"), 1, None).max() == 255
    deep = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    assert images.decode(encoded(deep, "PNG"), 1, None)[0, 0, 0] == 0x80


@pytest.mark.parametrize(("size", "shape"), [((20, 10), (3, 5, 10)), ((10, 21), (3, 10, 5))])
def test_resize_brings_the_short_side(size, shape):
    assert images.decode(encoded(gradient(*size), "PNG"), 3, 5).shape in (shape, (3, shape[1] + 1, shape[2]))


def test_damaged_bytes_and_other_formats_are_bad_images():
    whole = encoded(gradient(200, 200), "JPEG")
    png = encoded(gradient(), "PNG")
    for data in (
        b"",
        b"hello",
        whole[: len(whole) // 2],
        png[:40],
        encoded(gradient(), "BMP"),
        encoded(gradient(), "GIF"),
    ):
        with pytest.raises(images.BadImage):
            images.decode(data, 3, None)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_bad_images():
    for side in (8200, 60_000):
        with pytest.raises(images.BadImage):
            images.decode(bomb(side, side), 1, None)
    thin = encoded(Image.new("L", (1, 300_000)), "PNG")  # small, but resizing its short side would not be
    with pytest.raises(images.BadImage, match=r"short side"):
        images.decode(thin, 1, 64)


def test_fit_crops_the_middle_and_pads_with_zeros():
    canvas = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    assert images.fit(canvas, 2).tolist() == [[[5, 6], [9, 10]]]
    padded = images.fit(canvas + 1, 6)
    assert padded[0, 1:5, 1:5].tolist() == (canvas[0] + 1).tolist()
    assert padded.sum() == (canvas + 1).sum()


def draws(**values: float) -> np.ndarray:
    numbers = np.full(images.DRAWS, 0.5)
    for name, value in values.items():
        numbers[int(name[1:])] = value
    return numbers


def test_shift_and_flip_by_hand():
    canvas = np.arange(1, 10, dtype=np.uint8).reshape(1, 3, 3)
    shift = Data(size=3, augment=("shift",), shift=1)
    assert np.array_equal(images.augment(canvas, shift, draws()), canvas)  # the middle draw moves nothing
    moved = images.augment(canvas, shift, draws(d0=0.0, d1=0.99))
    assert moved.tolist() == [[[0, 0, 0], [2, 3, 0], [5, 6, 0]]]
    flip = Data(size=3, augment=("flip",))
    assert np.array_equal(images.augment(canvas, flip, draws(d6=0.4)), canvas[..., ::-1])
    assert np.array_equal(images.augment(canvas, flip, draws(d6=0.6)), canvas)


def test_crop_reaches_every_corner():
    canvas = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    crop = Data(size=3, augment=("crop",))
    assert images.augment(canvas, crop, draws(d2=0.0, d3=0.0))[0, 0, 0] == 0
    assert images.augment(canvas, crop, draws(d2=0.999, d3=0.999))[0, 2, 2] == 15
    assert images.augment(canvas[:, :2], crop, draws()).shape == (1, 3, 3)


def test_resized_crop_has_the_size_for_any_draw():
    config = Data(channels=3, size=7, augment=("resized-crop",))
    canvas = images.decode(encoded(gradient(31, 9), "PNG"), 3, None)
    for low in np.random.default_rng(0).random((50, images.DRAWS)):
        assert images.augment(canvas, config, low).shape == (3, 7, 7)
    everything = images.augment(canvas, config, draws(d4=0.999999))
    assert everything.std() > 0


def test_finish_of_a_batch_is_augment_of_each():
    config = Data(size=5, augment=("shift", "flip"), shift=2)
    rng = np.random.default_rng(1)
    batch, numbers = rng.integers(0, 256, (6, 1, 5, 5)).astype(np.uint8), rng.random((6, images.DRAWS))
    one_by_one = np.stack([images.augment(batch[i], config, numbers[i]) for i in range(6)])
    assert np.array_equal(images.finish(batch, config, numbers), one_by_one)


def test_normalize_by_hand_and_memory_format():
    batch = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    out = images.normalize(batch, (0.0, 0.2, 0.5), (1.0, 1.0, 0.5), channels_last=True)
    assert out[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert images.normalize(batch, (0.0,), (1.0,)).is_contiguous()
    assert batch.max() == 255  # the images themselves are left alone
