"""The augmentations: pure functions of pixels and draws.

A "canvas" is a decoded image, uint8 (H, W, C), before it is brought to the network's size.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data import decoder
from pipeline.data.decoder import Pixels
from pipeline.settings.data import Data

DRAWS = 8  # uniform numbers a sample has in an epoch: 0-1 shift, 2-3 place, 4-5 area and aspect, 6 flip, 7 spare


def fit(canvas: Pixels, size: int) -> Pixels:
    """The middle of a canvas as (size, size, C); zeros around it where it is smaller."""
    height, width, _ = canvas.shape
    return _cut(canvas, (height - size) // 2, (width - size) // 2, size)


def middle(canvas: Pixels, config: Data) -> Pixels:
    """What evaluation sees of a canvas, (size, size, C): its middle, of an image whose short side is data.resize."""
    height, width, _ = canvas.shape
    if config.resize is not None and min(height, width) != config.resize:  # one that was decoded for training
        canvas = decoder.resized(canvas, *decoder.short_side(height, width, config.resize), config.decoder)
    return fit(canvas, config.size)


def _cut(canvas: Pixels, top: int, left: int, size: int) -> Pixels:
    """The window (size, size, C) with its corner at (top, left). Parts outside of the canvas are zeros."""
    height, width, channels = canvas.shape
    if top >= 0 and left >= 0 and top + size <= height and left + size <= width:
        return canvas[top : top + size, left : left + size]
    out = np.zeros((size, size, channels), np.uint8)
    rows = slice(max(top, 0), min(top + size, height))
    columns = slice(max(left, 0), min(left + size, width))
    if rows.start < rows.stop and columns.start < columns.stop:
        out[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = canvas[rows, columns]
    return out


def needs_canvas(config: Data) -> bool:
    """Whether training uses pixels outside of the centre crop."""
    return "crop" in config.augment or "resized-crop" in config.augment


def window(canvas: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """The part of a canvas that training sees, (size, size, C): random for crop and resized-crop, else the middle."""
    if "resized-crop" in config.augment:
        return _resized_crop(canvas, config, draws)
    if "crop" in config.augment:
        height, width, _ = canvas.shape
        spare_y, spare_x = height - config.size, width - config.size
        # A canvas smaller than the window in one direction is centred in it.
        top = int(draws[2] * (spare_y + 1)) if spare_y >= 0 else spare_y // 2
        left = int(draws[3] * (spare_x + 1)) if spare_x >= 0 else spare_x // 2
        return _cut(canvas, top, left, config.size)
    return fit(canvas, config.size)


def _resized_crop(canvas: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """A rectangle of 8-100% of the area and aspect 3/4-4/3 (cut to what fits), brought to (size, size, C)."""
    height, width, _ = canvas.shape
    area = height * width * (0.08 + 0.92 * draws[4])
    aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[5])
    w = min(max(1, round(math.sqrt(area * aspect))), width)
    h = min(max(1, round(math.sqrt(area / aspect))), height)
    top, left = int(draws[2] * (height - h + 1)), int(draws[3] * (width - w + 1))
    return decoder.resized(canvas[top : top + h, left : left + w], config.size, config.size, config.decoder)


def finish(images: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """Shift and flip of a whole batch, (n, size, size, C), by its draws (n, DRAWS); it is changed where it lies."""
    if "shift" in config.augment and config.shift:
        images = _shifted(images, config.shift, draws)
    if "flip" in config.augment:
        pixels = torch.from_numpy(images)  # the same memory: torch flips rows of colours ten times as fast as NumPy
        for number in np.flatnonzero(draws[:, 6] < 0.5).tolist():
            pixels[number] = pixels[number].flip(1)
    return images


def _shifted(images: Pixels, most: int, draws: NDArray[np.float64]) -> Pixels:
    n, height, width, channels = images.shape
    moves = (draws[:, :2] * (2 * most + 1)).astype(np.int64)  # 0..2*most: the corner in the padded image
    padded = np.zeros((n, height + 2 * most, width + 2 * most, channels), np.uint8)
    padded[:, most : most + height, most : most + width] = images
    views = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    return np.ascontiguousarray(views[np.arange(n), moves[:, 0], moves[:, 1]].transpose(0, 2, 3, 1))


def augment(canvas: Pixels, config: Data, draws: NDArray[np.float64]) -> Pixels:
    """One training image (size, size, C) from a canvas and its DRAWS uniform numbers."""
    assert draws.shape == (DRAWS,), draws.shape
    return finish(window(canvas, config, draws)[None].copy(), config, draws[None])[0]


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], channels_last: bool = False
) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32 (x/255 - mean) / std on the tensor's own device, contiguous or channels last."""
    assert images.dtype == torch.uint8, images.dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    scaled = images.to(dtype=torch.float32, memory_format=layout).div_(255)
    make = _a_channel if images.device.type == "cpu" else _kept_a_channel
    return scaled.sub_(make(mean, images.device)).div_(make(std, images.device))


def _a_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One number for each channel, (1, C, 1, 1)."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


_kept_a_channel = functools.lru_cache(maxsize=16)(_a_channel)  # each copy to a GPU would wait for it
