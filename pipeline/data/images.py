"""Bytes of a JPEG or PNG to numbers, and the augmentations: pure functions of pixels and draws.

A "canvas" is the decoded image, uint8 (C, H, W), before it is brought to the network's size.
"""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipeline.settings.data import Data

Pixels = NDArray[np.uint8]

DRAWS = 8  # uniform numbers a sample has in an epoch: 0-1 shift, 2-3 place, 4-5 area and aspect, 6 flip, 7 spare
MAX_PIXELS = 64 * 2**20  # 64 Mpixel: past any photograph in use, far below what exhausts memory
_FORMATS = ("JPEG", "PNG")
# What Pillow is known to raise on damaged JPEG and PNG files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error)


class BadImage(Exception):
    """An image that cannot be read; the message says why."""


def decode(data: bytes, channels: int, resize: int | None) -> Pixels:
    """Decode a JPEG or PNG, whatever its name says, to uint8 (channels, H, W).

    Transparency is dropped, CMYK and palettes become colours, 16-bit greyscale its upper 8 bits. With
    `resize` the short side becomes so many pixels (bilinear, antialiased). Raises BadImage.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width}x{height} pixels are more than {MAX_PIXELS}")
            return _to_array(_short_side(_colours(image, channels), resize))
    except UnidentifiedImageError as error:
        raise BadImage("neither a JPEG nor a PNG") from error
    except Image.DecompressionBombError as error:
        raise BadImage(str(error)) from error
    except _DAMAGE as error:
        raise BadImage(str(error) or type(error).__name__) from error


def shrink(data: bytes, short: int, quality: int) -> bytes:
    """The image as RGB JPEG of `quality` with its short side brought down to `short` pixels (bilinear, antialiased).

    An image that is no larger comes back byte for byte. So does one that cannot be read, which is found and counted
    when it is used. With one version of Pillow, the same input bytes give the same output bytes.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if min(image.size) <= short or image.width * image.height > MAX_PIXELS:
                return data
            smaller = _short_side(_colours(image, 3), short)
    except (UnidentifiedImageError, Image.DecompressionBombError, BadImage, *_DAMAGE):
        return data
    stream = io.BytesIO()
    smaller.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _colours(image: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow would clip at 255
        upper = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(upper.clip(0, 255).astype(np.uint8)).convert(mode)
    if image.mode in ("P", "PA"):
        return image.convert("RGBA").convert("RGB").convert(mode)
    if image.mode == "CMYK":
        return image.convert("RGB").convert(mode)
    if image.mode == mode:
        image.load()
        return image
    return image.convert(mode)


def _short_side(image: Image.Image, resize: int | None) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    if resize is None or short == resize:
        return image
    target = (max(1, round(width * resize / short)), max(1, round(height * resize / short)))
    if target[0] * target[1] > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels, brought to a short side of {resize}, are more than {MAX_PIXELS}")
    return image.resize(target, Image.Resampling.BILINEAR)


def _to_array(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def fit(canvas: Pixels, size: int) -> Pixels:
    """The middle of a canvas as (C, size, size); zeros around it where it is smaller."""
    _, height, width = canvas.shape
    return _cut(canvas, (height - size) // 2, (width - size) // 2, size)


def _cut(canvas: Pixels, top: int, left: int, size: int) -> Pixels:
    """The window (C, size, size) with its corner at (top, left). Parts outside of the canvas are zeros."""
    channels, height, width = canvas.shape
    if top >= 0 and left >= 0 and top + size <= height and left + size <= width:
        return canvas[:, top : top + size, left : left + size]
    out = np.zeros((channels, size, size), np.uint8)
    rows = slice(max(top, 0), min(top + size, height))
    columns = slice(max(left, 0), min(left + size, width))
    if rows.start < rows.stop and columns.start < columns.stop:
        out[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = canvas[
            :, rows, columns
        ]
    return out


def needs_canvas(config: Data) -> bool:
    """Whether training uses pixels outside of the centre crop."""
    return "crop" in config.augment or "resized-crop" in config.augment


def window(canvas: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """The part of a canvas that training sees, (C, size, size): random for crop and resized-crop, else the middle."""
    if "resized-crop" in config.augment:
        return _resized_crop(canvas, config.size, draws)
    if "crop" in config.augment:
        _, height, width = canvas.shape
        spare_y, spare_x = height - config.size, width - config.size
        # A canvas smaller than the window in one direction is centred in it.
        top = int(draws[2] * (spare_y + 1)) if spare_y >= 0 else spare_y // 2
        left = int(draws[3] * (spare_x + 1)) if spare_x >= 0 else spare_x // 2
        return _cut(canvas, top, left, config.size)
    return fit(canvas, config.size)


def _resized_crop(canvas: Pixels, size: int, draws: NDArray[np.float64]) -> Pixels:
    """A rectangle of 8-100% of the area and aspect 3/4-4/3 (cut to what fits), brought to (C, size, size)."""
    channels, height, width = canvas.shape
    area = height * width * (0.08 + 0.92 * draws[4])
    aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[5])
    w = min(max(1, round(math.sqrt(area * aspect))), width)
    h = min(max(1, round(math.sqrt(area / aspect))), height)
    top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
    part = canvas[:, top : top + h, left : left + w]
    image = Image.fromarray(part[0] if channels == 1 else np.ascontiguousarray(part.transpose(1, 2, 0)))
    return _to_array(image.resize((size, size), Image.Resampling.BILINEAR))


def finish(images: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """Shift and flip of a whole batch, (n, C, size, size), by its draws (n, DRAWS); new memory where it changes."""
    if "shift" in config.augment and config.shift:
        images = _shifted(images, config.shift, draws)
    if "flip" in config.augment:
        images = np.where((draws[:, 6] < 0.5)[:, None, None, None], images[..., ::-1], images)
    return images


def _shifted(images: Pixels, most: int, draws: NDArray[np.float64]) -> Pixels:
    n, channels, height, width = images.shape
    moves = (draws[:, :2] * (2 * most + 1)).astype(np.int64)  # 0..2*most: the corner in the padded image
    padded = np.zeros((n, channels, height + 2 * most, width + 2 * most), np.uint8)
    padded[:, :, most : most + height, most : most + width] = images
    views = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.ascontiguousarray(views[np.arange(n), :, moves[:, 0], moves[:, 1]])


def augment(canvas: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """One training image (C, size, size) from a canvas and its DRAWS uniform numbers."""
    assert draws.shape == (DRAWS,), draws.shape
    return finish(window(canvas, config, draws)[None], config, draws[None])[0]


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool = False
) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 (x/255 - mean) / std on the tensor's own device."""
    assert images.dtype == torch.uint8, images.dtype
    layout = torch.channels_last if channels_last else torch.preserve_format
    scaled = images.to(dtype=torch.float32, memory_format=layout).div_(255)
    shape = (1, -1, 1, 1)
    centre = torch.tensor(mean, device=images.device).view(shape)
    return scaled.sub_(centre).div_(torch.tensor(std, device=images.device).view(shape))
