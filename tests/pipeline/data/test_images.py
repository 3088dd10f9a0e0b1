"""Augmentation of canvases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data import images
from pipeline.settings.data import Data


def test_fit_crops_the_middle_and_pads_with_zeros():
    canvas = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    assert images.fit(canvas, 2)[:, :, 0].tolist() == [[5, 6], [9, 10]]
    padded = images.fit(canvas + 1, 6)
    assert padded[1:5, 1:5].tolist() == (canvas + 1).tolist()
    assert padded.sum() == (canvas + 1).sum()


def draws(**values: float) -> np.ndarray:
    numbers = np.full(images.DRAWS, 0.5)
    for name, value in values.items():
        numbers[int(name[1:])] = value
    return numbers


def test_shift_and_flip_by_hand():
    canvas = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1)
    shift = Data(size=3, augment=("shift",), shift=1)
    assert np.array_equal(images.augment(canvas, shift, draws()), canvas)  # the middle draw moves nothing
    moved = images.augment(canvas, shift, draws(d0=0.0, d1=0.99))
    assert moved[:, :, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]
    flip = Data(size=3, augment=("flip",))
    assert np.array_equal(images.augment(canvas, flip, draws(d6=0.4)), canvas[:, ::-1])
    assert np.array_equal(images.augment(canvas, flip, draws(d6=0.6)), canvas)


def test_crop_reaches_every_corner():
    canvas = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    crop = Data(size=3, augment=("crop",))
    assert images.augment(canvas, crop, draws(d2=0.0, d3=0.0))[0, 0, 0] == 0
    assert images.augment(canvas, crop, draws(d2=0.999, d3=0.999))[2, 2, 0] == 15
    assert images.augment(canvas[:2], crop, draws()).shape == (3, 3, 1)


@pytest.mark.parametrize("decoder", ["turbo", "pillow"])
def test_resized_crop_has_the_size_for_any_draw(decoder):
    config = Data(channels=3, size=7, augment=("resized-crop",), decoder=decoder)
    rows, columns = np.mgrid[0:9, 0:31]
    canvas = np.stack([rows * 12, columns * 8, rows * 0 + 40], axis=2).astype(np.uint8)
    for low in np.random.default_rng(0).random((50, images.DRAWS)):
        assert images.augment(canvas, config, low).shape == (7, 7, 3)
    everything = images.augment(canvas, config, draws(d4=0.999999))
    assert everything.std() > 0


def test_finish_of_a_batch_is_augment_of_each():
    config = Data(size=5, augment=("shift", "flip"), shift=2)
    rng = np.random.default_rng(1)
    batch, numbers = rng.integers(0, 256, (6, 5, 5, 1)).astype(np.uint8), rng.random((6, images.DRAWS))
    one_by_one = np.stack([images.augment(batch[i], config, numbers[i]) for i in range(6)])
    assert np.array_equal(images.finish(batch.copy(), config, numbers), one_by_one)


def test_normalize_by_hand_and_memory_format():
    batch = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4).contiguous()
    out = images.normalize(batch, (0.0, 0.2, 0.5), (1.0, 1.0, 0.5), channels_last=True)
    assert out[0, :, 0, 0].tolist() == pytest.approx([0.0, 0.0, 1.0])
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert images.normalize(batch, (0.0,), (1.0,)).is_contiguous()
    assert batch.max() == 255  # the images themselves are left alone
