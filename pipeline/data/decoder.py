"""Bytes of a JPEG or PNG to pixels, and back to a smaller JPEG.

`data.decoder` says how. `turbo` reads ordinary JPEGs with simplejpeg, at a half, a quarter or an eighth where that is
enough, and resizes with torch. Whatever else there is (PNG, CMYK, colours wanted as grey, damaged files) Pillow reads.
`pillow` reads everything with Pillow, as runs did that are older than the setting.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from pipeline.settings.data import Decoder

Pixels = NDArray[np.uint8]  # (height, width, channels)

MAX_PIXELS = 64 * 2**20  # 64 Mpixel: past any photograph in use, far below what exhausts memory
_FORMATS = ("JPEG", "PNG")
_SCALES = (8, 4, 2)  # divisors at which libjpeg-turbo decodes faster than it does in full
# Colour spaces of a JPEG that become so many channels as Pillow would make them.
_SPACES = {1: ("Gray",), 3: ("Gray", "RGB", "YCbCr")}
# What Pillow is known to raise on damaged JPEG and PNG files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)


class BadImage(Exception):
    """An image that cannot be read; the message says why."""


def decode(
    data: bytes, channels: int, resize: int | None = None, decoder: Decoder = "pillow", cropped: bool = False
) -> Pixels:
    """Decode a JPEG or PNG, whatever its name says, to uint8 (H, W, channels).

    Transparency is dropped, CMYK and palettes become colours, 16-bit greyscale its upper 8 bits. With
    `resize` the short side becomes so many pixels (bilinear, antialiased). An image that is to be `cropped` and resized
    afterwards is not resized yet by `turbo`, which only takes care to keep a short side of so many pixels where it has
    them. Raises BadImage.
    """
    if decoder == "turbo":
        found = _turbo(data, channels, resize, cropped)
        if found is not None:
            return found
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            return _to_array(_brought(_colours(image, channels), resize))
    except UnidentifiedImageError as error:
        raise BadImage("neither a JPEG nor a PNG") from error
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except _DAMAGE as error:
        raise BadImage(str(error) or type(error).__name__) from error


def _turbo(data: bytes, channels: int, resize: int | None, cropped: bool) -> Pixels | None:
    """The pixels of an ordinary JPEG; None for what is left to Pillow."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if space not in _SPACES[channels] or height * width > MAX_PIXELS:
            return None
        if resize is not None:
            short_side(height, width, resize)  # BadImage where it would be huge, though it may be resized later
        divisor = next((each for each in _SCALES if resize and min(height, width) >= each * resize), 1)
        canvas: Pixels = simplejpeg.decode_jpeg(
            data, "GRAY" if channels == 1 else "RGB", min_factor=divisor,
            min_height=-(-height // divisor), min_width=-(-width // divisor),
        )  # fmt: skip
    except ValueError:  # damaged: Pillow may still read it, and else says what is wrong
        return None
    if resize is None or cropped:
        return canvas
    return resized(canvas, *short_side(height, width, resize), "turbo")


def resized(canvas: Pixels, height: int, width: int, decoder: Decoder) -> Pixels:
    """A canvas brought to (height, width, channels), bilinear, antialiased: by torch or, for `pillow`, by Pillow."""
    if canvas.shape[:2] == (height, width):
        return canvas
    if decoder == "pillow":
        canvas = np.ascontiguousarray(canvas)
        image = Image.fromarray(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas)
        return _to_array(image.resize((width, height), Image.Resampling.BILINEAR))
    writable = np.require(canvas, requirements="W")  # or torch warns
    # A batch of one before it is permuted: so torch sees that channels come last, and its result has them last too.
    planes = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
    made = interpolate(planes, (height, width), mode="bilinear", antialias=True)
    out: Pixels = made[0].permute(1, 2, 0).numpy()
    return out


def shrink(data: bytes, short: int, quality: int) -> bytes:
    """The image as RGB JPEG of `quality` with its short side brought down to `short` pixels (bilinear, antialiased).

    An image that is no larger comes back byte for byte. So does one that cannot be read, which is found and counted
    when it is used. With one version of Pillow, the same input bytes give the same output bytes.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if min(image.size) <= short or image.width * image.height > MAX_PIXELS:
                return data
            smaller = _brought(_colours(image, 3), short)
    except (UnidentifiedImageError, Image.DecompressionBombError, BadImage, *_DAMAGE):
        return data
    stream = io.BytesIO()
    smaller.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def upper_half(image: Image.Image) -> Image.Image:
    """16-bit greyscale, which Pillow would clip at 255, as 8-bit: the upper half of each number."""
    upper = np.asarray(image).astype(np.int64) >> 8
    return Image.fromarray(upper.clip(0, 255).astype(np.uint8))


def _colours(image: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):
        return upper_half(image).convert(mode)
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB").convert(mode)
    if image.mode == "CMYK":
        return image.convert("RGB").convert(mode)
    if image.mode == mode:
        image.load()
        return image
    return image.convert(mode)


def _brought(image: Image.Image, resize: int | None) -> Image.Image:
    width, height = image.size
    if resize is None or min(width, height) == resize:
        return image
    target = short_side(height, width, resize)
    return image.resize((target[1], target[0]), Image.Resampling.BILINEAR)


def short_side(height: int, width: int, resize: int) -> tuple[int, int]:
    """(height, width) of an image whose short side is brought to `resize`. Raises BadImage where it would be huge."""
    short = min(height, width)
    target = (max(1, round(height * resize / short)), max(1, round(width * resize / short)))
    if target[0] * target[1] > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, brought to a short side of {resize}, are more than {MAX_PIXELS}")
    return target


def _to_array(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
