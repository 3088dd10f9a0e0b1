"""Small data sets made on the spot, and where the real ones are."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """picture(seed, kind, mode, size): the bytes of an image of noise."""

    def make(seed: int, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (12, 10)) -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(stream, kind)
        return stream.getvalue()

    return make


@pytest.fixture
def class_folder(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """train/<class>/* of 30 images and val/<class>/* of 6: JPEG, grey, CMYK, and a PNG called .JPEG."""
    root = tmp_path / "folder"
    number = 0
    for part, count in (("train", 15), ("val", 3)):
        for name in ("n02", "n01"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                kind, mode = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")][i % 4]
                ending = ("JPEG", "jpg", "JPG", "JPEG")[i % 4]
                (root / part / name / f"pic.{i}.{ending}").write_bytes(picture(number, kind, mode))
                number += 1
    return root
