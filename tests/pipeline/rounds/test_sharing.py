"""Shared values in whole runs: what is handed over, what is measured, and a fine-tuning that was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_run import ALONE, carry_out, equal, final_weights

from pipeline import stages
from pipeline.base.errors import RunStopped, UserError
from pipeline.export import packed
from pipeline.local import LocalEngine
from pipeline.network.survey import survey
from pipeline.rounds import sharing
from pipeline.rounds.subject import Subject
from pipeline.run.events import unheard
from pipeline.run.layout import handed_over
from pipeline.run.records import CodebookMetrics
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config
from pipeline.task.answers import Marks
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.session import open_session
from pipeline.train.world import World, configure_process

SETTINGS: dict[str, Any] = {
    "prune.allocation": "pooled", "export.codebook_bits": {"fc": 3, "*.bias": 2}, "export.codebook_epochs": 2,
    "retrain.checkpoint_steps": 5,
}  # fmt: skip


def opened(config: Config) -> tuple[Run, CodebookMetrics]:
    run = Run(run_root(config), 0)
    return run, run.load(CodebookMetrics, "rounds/codebook", "metrics.json")


def test_the_network_that_is_handed_over_shares_values_and_is_the_one_that_was_measured(
    tiny: Callable[..., Config], interrupt: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(name="whole", **SETTINGS)
    result = carry_out(whole)
    run, metrics = opened(whole)
    weights = final_weights(whole)
    assert handed_over(run) == "rounds/codebook"
    assert {each.name: each.bits for each in metrics.tensors} == {
        f"fc{number}.{part}": bits for part, bits in (("weight", 3), ("bias", 2)) for number in (1, 2, 3)
    }
    for each in metrics.tensors:
        values = weights[each.name][weights[each.name] != 0].unique()
        assert len(values) <= each.values <= 2**each.bits
        assert torch.equal(values.half().float(), values)
    assert equal(packed.read(run.path("final", "model.packed")), weights)
    assert result["bytes"]["packed"] < 0.2 * packed.write(run.path("final", "as-before.packed"), weights).total
    assert result["bytes"]["packed_bound"] < result["bytes"]["packed"]
    for layer in result["layers"]:
        assert layer["packed_index_bits_per_kept"] < layer["packed_bits_per_kept"] < 32
        assert layer["packed_bound_bits_per_kept"] > 0

    assert result["val"]["pruned"]["top1"] == metrics.val.top1
    assert result["weights_kept"] == result["weights_total"] // 6
    marks = Marks.load(Path(run.path("final", "test_answers.npz")).read_bytes(), "pruned")
    assert np.mean(marks.right[marks.valid]) == pytest.approx(result["test"]["pruned"]["top1"])
    control = json.loads(Path(run.path("rounds/control.json")).read_text())
    assert len(control["history"]) == 3 * 2  # two rounds of two epochs, and the fine-tuning's
    assert control["history"][-1]["order"] == metrics.history[-1].order

    stopped = tiny(name="stopped", **SETTINGS)
    for step in (3, 12):
        interrupt("rounds/codebook", step)
        with pytest.raises(KeyboardInterrupt):
            carry_out(stopped)
    monkeypatch.undo()
    carry_out(stopped)
    files = [Path(opened(config)[0].path("final", "model.packed")).read_bytes() for config in (whole, stopped)]
    assert files[0] == files[1]


def test_without_epochs_values_are_those_of_k_means(tiny: Callable[..., Config]) -> None:
    config = tiny(**SETTINGS | {"export.codebook_epochs": 0, "prune.dense_control": False, "prune.rounds": 1})
    carry_out(config)
    _, metrics = opened(config)
    assert (metrics.steps, metrics.history) == (0, ())
    assert metrics.val.loss == pytest.approx(metrics.val_shared.loss, rel=1e-2)  # but for the rounding


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_trained(tiny: Callable[..., Config]) -> None:
    config = tiny(**SETTINGS | {"export.codebook_bits": {"conv9*": 4}})
    with pytest.raises(UserError, match=r"export.codebook_bits: 'conv9\*' matches no"):
        carry_out(config)
    assert not Run(run_root(config), 0).has("dense", "metrics.json")


def two_ranks(rank: int, folder: str, config: Config, run: Run) -> None:
    """Share the values of the network as it stands, on one of two ranks; what it holds afterwards, as a file."""
    configure_process(config.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    session = open_session(config, World(rank, 2, torch.device("cpu")), run, unheard)
    model = session.new_model()
    prunable, _ = survey(model)
    total = sum(tensor.weights for tensor in prunable)
    sharing.share(Subject(session, model, prunable, {}, None, None, None, total))
    torch.save(model.state_dict(), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_hold_the_same_values_to_the_bit(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(**SETTINGS)
    with open_run(config) as run:
        stages.carry_out([stages.SHARDS], stages.Driver(config, LocalEngine(ALONE), run, unheard))
        model = open_session(config, ALONE, run, unheard).new_model()
        checkpoint.save(run, "dense/checkpoint", Checkpoint(dict(model.state_dict())))
        mp.spawn(two_ranks, (str(tmp_path), config, run), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(first, second)
    assert equal(first, checkpoint.load(run, "rounds/codebook/checkpoint").weights)
    _, metrics = opened(config)
    assert metrics.steps > 0
    assert len(first["fc1.weight"].unique()) <= 8
    assert not equal(first, model.state_dict())


class Two:
    """A world whose ranks hold other values."""

    def same(self, value: int) -> bool:
        return False


class Apart:
    world = Two()


def test_ranks_with_other_values_stop_the_run() -> None:
    with pytest.raises(RunStopped, match="the ranks hold different values"):
        sharing.require_equal(Apart(), [torch.nn.Parameter(torch.ones(3))])  # type: ignore[arg-type]
