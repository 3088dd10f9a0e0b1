"""Decoding of real encoded bytes, by both decoders."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.data import decoder


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def gradient(width: int = 20, height: int = 10) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 12, columns * 12, rows * 0 + 40], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


def test_png_is_exact_and_channels_come_last():
    canvas = decoder.decode(encoded(gradient(), "PNG"), 3)
    assert canvas.shape == (10, 20, 3)
    assert canvas[2, 5].tolist() == [24, 60, 40]
    assert canvas.dtype == np.uint8


def test_grey_of_a_colour_image_and_colour_of_a_grey_one():
    grey = decoder.decode(encoded(gradient(), "PNG"), 1)
    assert np.array_equal(grey[:, :, 0], np.asarray(gradient().convert("L")))
    colour = decoder.decode(encoded(gradient().convert("L"), "JPEG", quality=95), 3)
    assert np.array_equal(colour[:, :, 0], colour[:, :, 2])


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (220, 30, 30))
    canvas = decoder.decode(encoded(red.convert("CMYK"), "JPEG", quality=95), 3)
    assert np.abs(canvas.mean(axis=(0, 1)) - [220, 30, 30]).max() < 8


def test_palette_alpha_one_bit_and_sixteen_bit_png():
    palette = encoded(gradient().quantize(8), "PNG", transparency=0)
    assert decoder.decode(palette, 3).shape == (10, 20, 3)
    alpha = Image.new("RGBA", (4, 4), (10, 20, 30, 128))
    assert decoder.decode(encoded(alpha, "PNG"), 3)[0, 0].tolist() == [10, 20, 30]
    assert decoder.decode(encoded(Image.new("1", (4, 4), 1), "PNG"), 1).max() == 255
    deep = Image.fromarray(np.full((4, 4), 0x8040, np.uint16))
    assert decoder.decode(encoded(deep, "PNG"), 1)[0, 0, 0] == 0x80


def photo(width: int = 300, height: int = 200) -> Image.Image:
    """Smooth colours with an edge."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(rows / 17), 127 + 120 * np.cos(columns / 23), np.where(columns > rows, 220, 30)]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_in_full_both_decoders_give_the_same_pixels(kind: str, mode: str, channels: int) -> None:
    data = encoded(photo().convert("RGB" if kind == "PNG" and mode == "CMYK" else mode), kind)
    pillow, turbo = (decoder.decode(data, channels, None, how) for how in ("pillow", "turbo"))
    assert turbo.shape == (200, 300, channels)
    assert np.array_equal(pillow, turbo)


@pytest.mark.parametrize("resize", [150, 99, 49, 20])
def test_resized_the_decoders_differ_by_little(resize: int) -> None:
    """Above half of the size by rounding only; below it, turbo decodes at a half, a quarter or an eighth."""
    data = encoded(photo(), "JPEG", quality=95)
    pillow, turbo = (decoder.decode(data, 3, resize, how).astype(int) for how in ("pillow", "turbo"))
    assert turbo.shape == pillow.shape == (resize, round(resize * 1.5), 3)
    difference = np.abs(pillow - turbo)
    assert difference.max() <= 1 if resize > 100 else difference.mean() < 4
    png = encoded(photo(), "PNG")
    assert np.array_equal(*(decoder.decode(png, 3, resize, how) for how in ("pillow", "turbo")))


@pytest.mark.parametrize(
    ("resize", "height"), [(None, 200), (201, 200), (101, 200), (100, 100), (51, 100), (50, 50), (25, 25), (1, 25)]
)
def test_what_is_cropped_later_is_decoded_at_a_scale_that_leaves_enough(resize: int | None, height: int) -> None:
    canvas = decoder.decode(encoded(photo(), "JPEG"), 3, resize, "turbo", cropped=True)
    assert canvas.shape == (height, height * 3 // 2 + height % 2, 3)


@pytest.mark.parametrize(("size", "shape"), [((20, 10), (5, 10, 3)), ((10, 21), (10, 5, 3))])
def test_resize_brings_the_short_side(size, shape):
    assert decoder.decode(encoded(gradient(*size), "PNG"), 3, 5).shape in (shape, (shape[0] + 1, *shape[1:]))


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
        for how in ("turbo", "pillow"):
            with pytest.raises(decoder.BadImage):
                decoder.decode(data, 3, None, how)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_bad_images():
    for side in (8200, 60_000):
        with pytest.raises(decoder.BadImage):
            decoder.decode(bomb(side, side), 1)
    thin = encoded(Image.new("L", (1, 300_000)), "PNG")  # small, but resizing its short side would not be
    with pytest.raises(decoder.BadImage, match=r"short side"):
        decoder.decode(thin, 1, 64)


def test_a_resized_image_lies_in_memory_as_it_is_read() -> None:
    canvas = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for part in (canvas, canvas[10:50, 5:70]):
        made = decoder.resized(part, 32, 32, "turbo")
        assert made.flags.c_contiguous  # else each copy of it would be a transposition, which takes as long as decoding
