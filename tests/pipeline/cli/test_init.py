"""`secateur init`: the config that it writes runs as it is, and an answer that will not do is refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.base.errors import UserError
from pipeline.cli import commands, init
from pipeline.cli.init import Answers
from pipeline.data import shards
from pipeline.local import LocalEngine
from pipeline.settings.data import Data
from pipeline.train.world import World


@pytest.fixture
def flowers(tmp_path: Path) -> Path:
    """A folder of small colour images: red ones, green ones, blue ones; 40 of each."""
    root, draw = tmp_path / "flowers", np.random.default_rng(0)
    for channel, name in enumerate(("blue", "green", "red")):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 80, (12, 14, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def test_a_folder_of_images_runs_without_an_edit(
    flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "flowers.yaml"
    init.write(Answers(data=str(flowers), target="4"), out)
    assert "next: secateur plan" in capsys.readouterr().out
    text = out.read_text()
    assert text.startswith("# yaml-language-server: $schema=")
    assert Path(text.splitlines()[0].partition("$schema=")[2]).is_file()
    assert 20 <= len(text.splitlines()) <= 30
    config = commands.load(out, ["tracking.enabled=false"])
    assert (config.data.channels, config.data.size, config.data.root) == (3, 12, str(flowers))
    commands.run(config, LocalEngine(World(0, 1, torch.device("cpu"))))
    result = json.loads((tmp_path / "runs/flowers/result.json").read_text())
    assert result["compression"] == pytest.approx(4, abs=0.01)
    assert result["test"]["dense"]["top1"] == 1.0  # three colours are no task
    shown = capsys.readouterr().out
    assert "top-5" not in shown
    assert "as good (95% of the drop" in shown


def test_large_images_get_a_network_and_a_crop_to_suit_them(tmp_path: Path) -> None:
    found = init.Found("folder", "/data/it's", 3, 500, 5000, 7)
    text = init.make(Answers(data="/data/it's"), found, "mine")
    assert "factory: torchvision.models.resnet18" in text
    assert "size: 224 " in text
    assert "resize: 256 " in text
    assert "root: '/data/it''s'" in text
    init.check(text, tmp_path / "mine.yaml", found)


def test_a_checkpoint_is_taken_as_it_is_and_no_loss_is_a_target() -> None:
    found = init.Found("folder", "/data", 3, 500, 5000, 7)
    text = init.make(Answers(data="/data", target="no-loss", checkpoint="/w/a.safetensors"), found, "mine")
    assert "dense: {epochs: 0," in text
    assert "checkpoint: /w/a.safetensors" in text
    assert "target: {mode: no-loss," in text


def test_shards_are_looked_at_as_a_folder_is(flowers: Path, tmp_path: Path) -> None:
    for mode, channels in (("RGB", 3), ("L", 1)):
        for file in flowers.rglob("*.png"):
            Image.open(file).convert(mode).save(file)
        root = str(tmp_path / mode)
        shards.build(Data.model_validate({"source": "folder", "root": str(flowers), "size": 12}), 0, root)
        found = init.look(root)
        assert (found.source, found.root, found.channels, found.pixels, found.classes) == (
            "shards", root, channels, 12, 3
        )  # fmt: skip


def test_a_checkpoint_of_s3_stays_where_it_is() -> None:
    found = init.Found("folder", "/data", 3, 500, 5000, 7)
    places = {"s3://bucket/a.pth": "s3://bucket/a.pth", "a.pth": str(Path.cwd() / "a.pth")}
    for given, wanted in places.items():
        text = init.make(Answers(data="/data", checkpoint=given), found, "mine")
        assert f"checkpoint: {wanted}\n" in text


@pytest.mark.parametrize("stem", ["2024", "1e5", "yes", "null", "0x1f", "mine-2"])
def test_a_run_may_have_any_files_name(stem: str, tmp_path: Path) -> None:
    out = tmp_path / f"{stem}.yaml"
    init.write(Answers(data="digits"), out)
    assert commands.read(out, []).name == stem


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Answers(), "--data PATH"),
        (Answers(data="digits", target="half"), "--target half"),
        (Answers(data="digits", target="0.5"), "--target 0.5"),
        (Answers(data="digits", network="resnet19"), "resnet19"),
        (Answers(data="/nowhere"), "/nowhere"),
    ],
)
def test_an_answer_that_will_not_do_is_refused_and_nothing_is_written(
    given: Answers, words: str, tmp_path: Path
) -> None:
    out = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match=words):
        init.write(given, out)
    assert not out.exists()


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        init.write(Answers(data="digits"), out)
    assert out.read_text() == "mine"
