"""Scans of whole runs: several machines' joined, a round's model, stopped ones that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.local import LocalEngine
from pipeline.run import journal
from pipeline.run.events import Event, LevelMeasured, TogetherMeasured, unheard
from pipeline.run.records import Joint, Scan
from pipeline.run.state import open_run, run_root
from pipeline.scan.known import TOGETHER
from pipeline.settings.config import Config
from pipeline.train.world import World, configure_process

ALONE = World(0, 1, torch.device("cpu"))
ONE = {"dense.epochs": 1}


def scan(config: Config, merged: tuple[str, ...] = (), after: int | None = None) -> tuple[Scan, list[str]]:
    """The scan, and the tensor of each level that was measured for it."""
    configure_process(config.threads)
    events: list[Event] = []
    with open_run(config) as here:
        found = stages.scan(config, LocalEngine(ALONE), here, events.append, merged, after)
    return found, [event.tensor for event in events if isinstance(event, LevelMeasured)]


def file(config: Config, name: str = "scan.json") -> Path:
    return Path(run_root(config)) / "scan" / name


def written(config: Config, name: str = "scan.json") -> Any:
    return json.loads(file(config, name).read_text())


def test_scans_of_several_machines_join_and_only_what_is_missing_is_measured(tiny: Callable[..., Config]) -> None:
    whole, measured = scan(tiny(name="whole", **ONE))
    assert measured == ["fc1.weight"] * 2 + ["fc2.weight"] * 2 + ["fc3.weight"] * 2
    first, second = (
        tiny(name="first", **ONE, **{"prune.include": ["fc1.*"]}),
        tiny(name="second", **ONE, **{"scan.levels": [0.5]}),
    )
    scan(first)
    scan(second)
    joined, measured = scan(tiny(name="joined", **ONE), (str(file(first)), str(file(second))))
    assert measured == ["fc2.weight", "fc3.weight"]  # at 0.1, which neither has
    assert joined == whole
    again, measured = scan(tiny(name="joined", **ONE), (str(file(first)),))
    assert (again, measured) == (whole, [])


def test_scans_of_something_else_are_refused(tiny: Callable[..., Config], tmp_path: Path) -> None:
    other = tiny(name="other", seed=1, **ONE, **{"scan.samples": 50})
    scan(other)
    with pytest.raises(UserError, match=r"its weights are others.*scan.samples is 50 there and None here"):
        scan(tiny(**ONE), (str(file(other)),))
    with pytest.raises(UserError, match=r"is not a scan\.json"):
        scan(tiny(**ONE), (str(file(other, "finished.json")),))
    less = written(other)
    del less["tensors"][0]["levels"][0]["drop"]
    (tmp_path / "older.json").write_text(json.dumps(less))
    with pytest.raises(UserError, match=r"is not a scan\.json"):
        scan(tiny(**ONE), (str(tmp_path / "older.json"),))
    with pytest.raises(UserError, match="cannot be read"):
        scan(tiny(**ONE), (str(tmp_path / "nowhere.json"),))


def test_a_finished_round_is_scanned_with_its_masks(tiny: Callable[..., Config]) -> None:
    config = tiny(**ONE, **{"prune.allocation": "uniform", "prune.dense_control": False, "retrain.epochs": 1})
    with pytest.raises(UserError, match="--after 1: no round is finished"):
        scan(config, after=1)
    configure_process(config.threads)
    stages.run(config, LocalEngine(ALONE), unheard)
    found, measured = scan(config, after=1)
    assert len(measured) == 6
    assert found.to_json() == written(config, "after-1.json")
    metrics = json.loads((Path(run_root(config)) / "rounds/01/metrics.json").read_text())
    assert found.after == 1
    assert [tensor.alive for tensor in found.tensors] == [layer["kept"] for layer in metrics["layers"]]
    assert found.dense.top1 == pytest.approx(metrics["val"]["top1"])
    first = found.tensors[0]
    level = first.levels[1]
    assert (level.density, level.kept, level.absolute) == (0.1, round(first.alive / 10), level.kept / first.weights)
    assert scan(config, after=1) == (found, [])  # which is not measured twice
    assert not file(config).exists()
    with pytest.raises(UserError, match="rounds 1 to 2 are finished"):
        scan(config, after=3)


def test_an_adaptive_scan_with_racing_goes_on_where_it_was_stopped(tiny: Callable[..., Config]) -> None:
    config = tiny(
        **{"scan.mode": "adaptive", "scan.levels": [0.5, 0.2, 0.02], "scan.max_levels": 6, "scan.interval": 0.1}
    )
    configure_process(config.threads)
    seen: list[tuple[str, float]] = []

    def stop_after_four(event: Event) -> None:
        if isinstance(event, LevelMeasured):
            seen.append((event.tensor, event.level.density))
            if len(seen) == 4:
                raise KeyboardInterrupt

    with open_run(config) as here, pytest.raises(KeyboardInterrupt):
        stages.scan(config, LocalEngine(ALONE), here, stop_after_four)
    events: list[Event] = []
    with open_run(config) as here:
        found = stages.scan(config, LocalEngine(ALONE), here, events.append)
    later = [(event.tensor, event.level.density) for event in events if isinstance(event, LevelMeasured)]
    assert later
    assert len({*seen, *later}) == len(seen) + len(later)  # none twice
    levels = [(t.name, level.density) for t in found.tensors for level in t.levels]
    assert sorted(levels) == sorted([*seen, *later])
    samples = [level.samples for t in found.tensors for level in t.levels]
    assert min(samples) < found.samples == max(*samples, found.samples)


def test_tensors_are_also_pruned_together_where_the_allocation_goes_by_it(tiny: Callable[..., Config]) -> None:
    config = tiny(**ONE, **{"prune.allocation": "budget", "scan.together": [0.5, 0.2, 0.01, 0.005]})
    configure_process(config.threads)

    class Stopped(LocalEngine):
        """One that is killed after so many allocations."""

        def together(self, *given: Any) -> Any:
            measure = super().together(*given)

            def until_three(keeps: Any) -> Any:
                for number, row in enumerate(measure(keeps)):
                    if number == 3:
                        raise KeyboardInterrupt
                    yield row

            return until_three

    with open_run(config) as here, pytest.raises(KeyboardInterrupt):
        stages.scan(config, Stopped(ALONE), here, unheard)
    events: list[Event] = []
    with open_run(config) as here:
        [key] = storage.list_folders(here.path("scan", TOGETHER))
        kept = [*journal.read(here, Joint, "scan", TOGETHER, key)]
        assert len(kept) == 3
        found = stages.scan(config, LocalEngine(ALONE), here, events.append)
    assert not [event for event in events if isinstance(event, LevelMeasured)]  # no level is measured again
    rows = found.together
    assert rows is not None
    assert [*dict.fromkeys(row.density for row in rows)] == [0.5, 0.2, 0.01]  # there it guesses: no further
    assert [row.keep for row in rows[:3]] == [row.keep for row in kept]
    assert [event.density for event in events if isinstance(event, TogetherMeasured)] == [0.5, 0.2, 0.01]
    whole, _ = scan(tiny(name="whole", **ONE, **{"prune.allocation": "budget", "scan.together": [0.5, 0.2, 0.01]}))
    assert whole.together == rows
    paper = tiny(name="paper", **ONE)
    assert scan(paper)[0].together is None
    assert "together" not in written(paper)
