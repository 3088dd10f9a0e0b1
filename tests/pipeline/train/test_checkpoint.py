"""Checkpoints: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from few_samples import run_in

from pipeline.base.errors import UserError
from pipeline.run.state import Run
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_in(tmp_path)


def example(step: int) -> Checkpoint:
    return Checkpoint(
        weights={"fc.weight": torch.arange(6.0).reshape(2, 3) + step},
        masks={"fc.weight": torch.tensor([[True, False, True], [False, False, True]])},
        optimizer={"fc.weight/momentum_buffer": torch.ones(2, 3)},
        state={"step": step, "history": [{"loss": 0.1}]},
    )


def test_what_is_saved_comes_back_to_the_bit(run: Run) -> None:
    checkpoint.save(run, "x", example(3))
    back = checkpoint.load(run, "x")
    assert torch.equal(back.weights["fc.weight"], example(3).weights["fc.weight"])
    assert torch.equal(back.masks["fc.weight"], example(3).masks["fc.weight"])
    assert torch.equal(back.optimizer["fc.weight/momentum_buffer"], torch.ones(2, 3))
    assert back.state == {"step": 3, "history": [{"loss": 0.1}]}


def test_tied_tensors_can_be_saved(run: Run) -> None:
    shared = torch.ones(2)
    checkpoint.save(run, "x", Checkpoint({"a": shared, "b": shared}))
    assert torch.equal(checkpoint.load(run, "x").weights["b"], shared)


@pytest.mark.parametrize("file", ["weights.safetensors", "masks.bin", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(run: Run, tmp_path: Path, file: str, harm: str) -> None:
    for step in (10, 20):
        checkpoint.save(run, checkpoint.step_folder("dense", step), example(step))
    path = tmp_path / checkpoint.step_folder("dense", 20) / file
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "flip":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.warns(UserWarning, match=f"torn: {file}.*the checkpoint before it is used"):
        found = checkpoint.latest(run, "dense")
    assert found is not None
    assert found.state["step"] == 10


def test_a_checkpoint_without_a_manifest_was_never_completed(run: Run, tmp_path: Path) -> None:
    checkpoint.save(run, checkpoint.step_folder("dense", 10), example(10))
    (tmp_path / checkpoint.step_folder("dense", 10) / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="never completed"):
        assert checkpoint.latest(run, "dense") is None


def test_only_the_last_checkpoints_are_kept(run: Run, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(run, checkpoint.step_folder("dense", step), example(step))
    checkpoint.keep_last(run, "dense", 2)
    assert [p.name for p in sorted((tmp_path / "dense/steps").iterdir())] == ["00000003", "00000004"]
    checkpoint.keep_last(run, "dense", 0)
    assert not (tmp_path / "dense/steps").exists()


def test_a_manifest_of_another_format_is_refused(run: Run) -> None:
    checkpoint.save(run, "x", example(1))
    run.commit({"format": 99}, "x", "manifest.json")
    with pytest.raises(UserError, match="another format"):
        checkpoint.load(run, "x")
