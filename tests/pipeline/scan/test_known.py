"""What a scan writes while it goes on grows with its levels, not with their square; real files, numbers made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import few_samples
import pytest
import scan_records
import torch
from support import written_bytes
from torch import nn

from pipeline.engine import Levels, OnLevel, Together
from pipeline.network.survey import Prunable
from pipeline.run.contents import mirrored_files
from pipeline.run.events import Event, LevelMeasured
from pipeline.run.records import Figures, Finding, Joint, JointTrials, ScanOrigin, Trials
from pipeline.run.state import Run
from pipeline.scan import scan as scans
from pipeline.scan.known import known, known_together
from pipeline.settings.config import Config
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint

ORIGIN = ScanOrigin("ab", "cd", {"seed": 0})
DENSE = Figures(0.9, 0.3, 100)
A_LEVEL = 1500  # bytes at most for a level: its line of the journal, and its part of scan.json


class Numbers:
    """An engine whose levels are made up; it stops, as if killed, after `most` of them."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.given: dict[str, list[float]] = {}

    def scan(self, todo: Levels, config: Config, run: Run, on_level: OnLevel, source: str) -> Figures:
        self.given = {name: [level.density for level in levels] for name, levels in todo.items()}
        count = 0
        for name, levels in todo.items():
            there = {level.density for level in levels}
            for density in config.scan.levels:
                if density not in there:
                    if count == self.most:
                        raise KeyboardInterrupt
                    on_level(name, scan_records.level(density))
                    count += 1
        return DENSE

    def together(self, config: Config, run: Run, source: str) -> Together:
        raise AssertionError("nothing is pruned together here")

    def train(self, *_: object) -> None:
        raise AssertionError("nothing is trained here")

    def close(self) -> None:
        pass


def many(folder: Path, tensors: int, levels: int) -> tuple[Config, Run, list[Prunable]]:
    """A run whose dense network has so many small tensors, to be scanned at so many levels."""
    densities = [round(1 - number / (levels + 1), 6) for number in range(1, levels + 1)]
    session = few_samples.session_on(folder, [([[255]], 0), ([[0]], 1)], classes=2, **{"scan.levels": densities})
    names = [f"block{number}.conv.weight" for number in range(tensors)]
    prunable = [Prunable(name, nn.Linear(2, 2), "fc", (2, 2), 4, ()) for name in names]
    weights = {name: torch.arange(4.0).reshape(2, 2) for name in names}
    checkpoint.save(session.run, scans.DENSE, Checkpoint(weights))
    return session.config, session.run, prunable


def test_bytes_grow_with_the_levels_of_a_thousand_tensors(tmp_path: Path) -> None:
    spent = {}
    for levels in (25, 50):
        config, here, prunable = many(tmp_path / str(levels), 1000, levels)
        events: list[Event] = []
        before = written_bytes()
        found = scans.measure(prunable, None, config, Numbers(), here, events.append)
        spent[levels] = written_bytes() - before
        done = [(event.done, event.total) for event in events if isinstance(event, LevelMeasured)]
        assert done == [(number, 1000 * levels) for number in range(1, 1000 * levels + 1)]
        assert sum(len(tensor.levels) for tensor in found.tensors) == 1000 * levels
    assert spent[25] < 1000 * 25 * A_LEVEL
    assert spent[50] < 2.1 * spent[25]


def test_a_stopped_scan_goes_on_with_all_that_was_measured(tmp_path: Path) -> None:
    config, here, prunable = many(tmp_path, 20, 10)
    with pytest.raises(KeyboardInterrupt):
        scans.measure(prunable, None, config, Numbers(most=57), here, lambda event: None)
    [file] = (tmp_path / "runs/tiny/scan/levels").glob("*/*.jsonl")
    assert len(file.read_bytes().splitlines()) == 57
    file.write_bytes(file.read_bytes()[:-10])  # the last line is torn
    seen: list[Event] = []
    again = Numbers()
    found = scans.measure(prunable, None, config, again, here, seen.append)
    densities = list(config.scan.levels)
    assert again.given == {
        "block5.conv.weight": densities[:6],
        **{f"block{number}.conv.weight": [] for number in range(6, 20)},
    }
    assert len(seen) == 200 - 56
    fresh = many(tmp_path / "fresh", 20, 10)
    assert found == scans.measure(fresh[2], None, fresh[0], Numbers(), fresh[1], lambda event: None)
    nothing = Numbers()
    assert scans.measure(prunable, None, config, nothing, here, seen.append) == found
    assert (nothing.given, len(seen)) == ({}, 200 - 56)


def test_the_mirror_is_not_woken_by_levels(tmp_path: Path) -> None:
    """MLflow is brought up to date where a mirrored file changes: once the scan is over, not with each level."""
    config, here, prunable = many(tmp_path, 2, 3)
    before = mirrored_files(here.root)
    seen = []

    def look(event: Event) -> None:
        seen.append(mirrored_files(here.root))

    scans.measure(prunable, None, config, Numbers(), here, look)
    assert seen == [before] * 6
    assert sorted(mirrored_files(here.root).keys() - before.keys()) == ["scan/scan.json"]


def test_levels_of_an_older_run_are_known(tmp_path: Path) -> None:
    here = few_samples.run_in(tmp_path)
    old = [scan_records.level(0.5), scan_records.level(0.1)]
    here.commit(Trials(ORIGIN, DENSE, {"a": old}), "scan", "trials.json")
    with known(here, ORIGIN, "trials.json") as levels:
        assert (levels.of("a"), levels.dense, levels.count) == (old, DENSE, 2)
        assert not levels.add("a", scan_records.level(0.5, rise=7.0))
        assert levels.add("a", scan_records.level(0.2))
        levels.set_dense(DENSE)
    before = here.read("scan", "trials.json")
    with known(here, ORIGIN, "trials.json") as levels:
        assert [level.density for level in levels.of("a")] == [0.5, 0.1, 0.2]
    assert here.read("scan", "trials.json") == before
    [file] = (tmp_path / "scan/levels").glob("*/*.jsonl")
    [line] = file.read_text().splitlines()
    assert Finding.from_json(json.loads(line), "") == Finding(tensor="a", level=scan_records.level(0.2))
    with known(here, replace(ORIGIN, weights="ef"), "trials.json") as levels:
        assert (levels.count, levels.dense) == (0, None)


def joint(count: int) -> Joint:
    return Joint(keep={"a": count}, **scan_records.DIFFERENCE)


def test_what_an_older_run_measured_together_is_known(tmp_path: Path) -> None:
    here = few_samples.run_in(tmp_path)
    here.commit(JointTrials(ORIGIN, (joint(5),)), "scan", "together.json")
    with known_together(here, ORIGIN) as rows:
        rows.add(joint(3))
    with known_together(here, ORIGIN) as rows:
        assert [row.keep["a"] for row in rows.rows.values()] == [5, 3]
    with known_together(here, replace(ORIGIN, data="ef")) as rows:
        assert rows.rows == {}
