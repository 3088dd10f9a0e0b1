"""A run that meets harm which trying again would meet again stops, by one message, and goes on when it is mended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.limits import command
from faults.runs import Line, same_weights

from pipeline import stages
from pipeline.data import shards
from pipeline.local import LocalEngine
from pipeline.run.events import EpochEnded, Event, Progress, Resumed, unheard
from pipeline.settings.config import Config
from pipeline.train.world import World

pytestmark = pytest.mark.faults

Tiny = Callable[..., Config]
QUICK = {"prune.allocation": "uniform", "dense.checkpoint_steps": 10}


def carry_out(config: Config, progress: Progress = unheard) -> str | None:
    """What `run` does: None, or the one message that it ends with."""
    return command(lambda: stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), progress))


def resumed(events: list[Event]) -> int:
    """The step at which dense training went on."""
    return next(event.step for event in events if isinstance(event, Resumed) and event.phase == "dense")


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_shard_that_is_corrupted_in_mid_run(cache_bytes: int, tiny: Tiny, tmp_path: Path, line: Line) -> None:
    """One bit of one image, which a decoder would not mind. From memory it is met in the next run that reads it."""
    shards.build(tiny().data, 0, str(tmp_path / "shards"))
    data = {"data.source": "shards", "data.root": str(tmp_path / "shards"), "data.cache_bytes": cache_bytes, **QUICK}
    config, undisturbed = (tiny(**data, runs_dir=str(tmp_path / name)) for name in ("a", "b"))
    started = time.monotonic()
    assert carry_out(undisturbed) is None
    seconds = time.monotonic() - started
    shard = tmp_path / "shards/train-00000.tar"
    whole = shard.read_bytes()

    def harm(event: Event) -> None:
        if isinstance(event, EpochEnded) and event.phase == "dense" and event.epoch.epoch == 2:
            corrupt(shard)
            if cache_bytes:
                raise KeyboardInterrupt

    started = time.monotonic()
    if cache_bytes:
        with pytest.raises(KeyboardInterrupt):
            stages.run(config, LocalEngine(World(0, 1, torch.device("cpu"))), harm)
        message = carry_out(config)
    else:
        message = carry_out(config, harm)
    assert message is not None
    assert f"{shard}' holds other bytes in the image of sample" in message
    assert (tmp_path / "a/tiny/dense/steps").is_dir()
    shard.write_bytes(whole)
    events: list[Event] = []
    assert carry_out(config, events.append) is None
    assert same_weights(tmp_path / "a/tiny", tmp_path / "b/tiny")
    assert resumed(events) >= (30 if cache_bytes else 40)  # of 60 steps; the harm came when 40 were made
    where = "from memory" if cache_bytes else "as it streams"
    line(f"corrupt shard, {where}", "stops cleanly", "<=10", time.monotonic() - started - seconds)


def corrupt(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[data.index(b"IEND") + 6] ^= 1  # the CRC of the last chunk of a PNG
    shard.write_bytes(data)


def test_a_loss_that_is_not_finite(tiny: Tiny, tmp_path: Path, line: Line) -> None:
    switch = tmp_path / "broken"
    network = {"model.factory": "faults.broken:network", "model.kwargs": {"switch": str(switch), "after": 35}, **QUICK}
    config, undisturbed = (tiny(**network, runs_dir=str(tmp_path / name)) for name in ("a", "b"))
    started = time.monotonic()
    assert carry_out(undisturbed) is None
    seconds = time.monotonic() - started
    switch.touch()
    started = time.monotonic()
    message = carry_out(config)
    assert message is not None
    assert "dense: the gradient of step 35 is not finite" in message
    assert "no update was made" in message
    switch.unlink()
    events: list[Event] = []
    assert carry_out(config, events.append) is None
    assert same_weights(tmp_path / "a/tiny", tmp_path / "b/tiny")
    assert resumed(events) >= 30
    line("loss that is not finite", "stops cleanly", 35 - resumed(events), time.monotonic() - started - seconds)
