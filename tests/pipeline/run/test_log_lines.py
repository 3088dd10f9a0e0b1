"""Reading a run's log while it is written: whole lines, in the order of time, each once, as the events they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.run import log
from pipeline.run.events import Event, LevelMeasured, Noted, Outlined, StageBegun, Stepped, Warned
from pipeline.run.log_lines import LogLines
from pipeline.run.records import RunFacts
from pipeline.run.state import Run

EVENTS: list[Event] = [
    StageBegun("dense", "dense network", False, 2, 5),
    Outlined(("shards", "dense"), None, 1, 2, 3, True),
    Stepped("dense", 3, 10),
    Noted("a note"),
    Warned("a warning"),
]


def a_run(root: str) -> Run:
    run = Run(root, 1)
    storage.write_json(run.path("run.json"), RunFacts("abc", "demo", 0).to_json())
    return run


def test_events_come_back_as_they_were_each_once(tmp_path: Path) -> None:
    run, said = a_run(str(tmp_path)), list[str]()
    reading = LogLines(tmp_path, driver=True)
    with log.kept(run, "driver-0001", said.append) as kept, log.kept(run, "0001-dense-1-rank-0", said.append, 0, 1):
        for event in EVENTS[:2]:
            kept(event)
        assert [line.told for line in reading.new()] == EVENTS[:2]
        for event in EVENTS[2:]:
            kept(event)
    lines = reading.new()
    assert [line.told for line in lines[:-1]] == EVENTS[2:]
    assert (lines[-1].event, lines[-1].message) == ("Ended", "ended well")
    assert reading.new() == []
    everything = LogLines(tmp_path).new()
    assert {line.rank for line in everything} == {None, 0}
    assert [line.time for line in everything] == sorted(line.time for line in everything)
    assert not said


def test_events_come_back_from_s3(s3: str) -> None:
    run, said = a_run(f"{s3}/runs/demo"), list[str]()
    reading = LogLines(run.root, driver=True)
    with log.kept(run, "driver-0001", said.append) as kept:
        for event in EVENTS:
            kept(event)
    assert [line.told for line in reading.new()][: len(EVENTS)] == EVENTS
    assert not said


def test_a_torn_line_waits_for_its_end_and_strange_ones_are_no_events(tmp_path: Path) -> None:
    file = tmp_path / "log" / "driver-0001.jsonl"
    file.parent.mkdir()
    reading = LogLines(tmp_path)
    whole = json.dumps({"time": "2026-01-01T00:00:00+00:00", "event": "Noted", "message": "hello"})
    file.write_text(whole[:20])
    assert reading.new() == []
    file.write_text(whole + "\n")
    assert [line.told for line in reading.new()] == [Noted("hello")]
    level = {"tensor": "fc1", "level": {"top1": "nan"}, "done": 1, "total": 2}
    for line in (
        "torn{",
        "[]",
        json.dumps({"event": "Unheard"}),
        json.dumps({"event": "LevelMeasured", "data": level}),
    ):
        with file.open("a") as out:
            out.write(line + "\n")
    strange = reading.new()
    assert [line.told for line in strange] == [None, None]
    assert strange[1].event == LevelMeasured.__name__


def test_a_link_out_of_the_run_is_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}\n")
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "run" / "log" / "driver-0001.jsonl").symlink_to(secret)
    with pytest.raises(UserError):
        LogLines(tmp_path / "run").new()
