"""A run's own log: what a line says, where lines go, and that a run goes on whatever becomes of them."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.proxy import Fault, Proxy
from support import free_port

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.cli.display import Display
from pipeline.local import LocalEngine
from pipeline.run import journal, log
from pipeline.run.events import Event, Noted, Paced, Stepped, Warned
from pipeline.run.log import JsonLines
from pipeline.run.records import RunFacts
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.storage import s3 as boto
from pipeline.train.world import World

KEYS = ["time", "level", "run", "uid", "fence", "rank", "attempt", "step", "event", "message"]


def a_run(root: Path | str) -> Run:
    run = Run(str(root), 3)
    storage.write_json(run.path("run.json"), RunFacts("abc", "demo", 0).to_json())
    return run


def parsed(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.decode().splitlines()]


def lines(root: Path | str, name: str) -> list[dict[str, Any]]:
    return parsed(storage.read_bytes(storage.join(root, "log", f"{name}.jsonl")))


def sent(run: Run) -> list[str]:
    return storage.list_files(run.path("log"))


def test_a_line_says_when_where_and_what() -> None:
    record = logging.LogRecord("secateur.run", logging.INFO, "here.py", 1, "%s", ("hello",), None)
    record.created = 0.25
    record.__dict__ |= {"event": "Stepped", "data": {"phase": "dense", "step": 7}}
    context = {"run": "r", "uid": "u", "fence": 2, "rank": 1, "attempt": 4}
    line = JsonLines(context).format(record)
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "INFO",
        **context,
        "step": 7,
        "event": "Stepped",
        "message": "hello",
        "data": {"phase": "dense"},
    }


def test_events_warnings_and_the_end_are_lines(tmp_path: Path) -> None:
    heard: list[Event] = []
    events = [
        Noted("began"),
        Warned("see https://me:secret@host/x?token=hidden"),
        Stepped("dense", 5, 10),
        Paced("dense", 5, 0, float("nan"), 0.5, 0, 0),
    ]

    def work() -> None:
        with log.kept(a_run(tmp_path), "one", lambda text: None, 1, 2) as kept:
            for event in events:
                kept.hearing(heard.append)(event)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert heard == events
    found = lines(tmp_path, "one")
    assert [list(line)[:10] for line in found] == [KEYS] * 5
    assert {(line["uid"], line["fence"], line["rank"], line["attempt"]) for line in found} == {("abc", 3, 1, 2)}
    assert [line["level"] for line in found] == ["INFO", "WARNING", "INFO", "INFO", "ERROR"]
    assert [line["message"] for line in found[:2]] == ["began", "see https://host/x?token=***"]
    assert (found[2]["step"], found[2]["data"]) == (5, {"phase": "dense", "steps": 10})
    assert found[3]["data"]["images_per_s"] == "nan"
    assert found[4]["message"] == "ended by ValueError: broken"
    assert "Traceback" in found[4]["error"]


def test_python_warnings_are_lines_and_still_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
    with log.kept(a_run(tmp_path), "one", shown.append):
        warnings.showwarning("odd", UserWarning, "file.py", 1)
    assert shown == ["odd"]
    assert [(line["level"], line["message"]) for line in lines(tmp_path, "one")] == [
        ("WARNING", "odd"),
        ("INFO", "ended well"),
    ]


def test_a_log_that_cannot_be_written_is_told_of_once(tmp_path: Path) -> None:
    run, told = a_run(tmp_path), list[str]()
    (tmp_path / "log").write_text("a file where the folder should be")
    with log.kept(run, "one", told.append) as kept:
        for step in range(5):
            kept(Stepped("dense", step, 10))
        assert len(told) == 1
        assert "cannot be written" in told[0]
        (tmp_path / "log").unlink()  # and lines are kept as soon as they can be
        kept(Noted("again"))
    assert [line["message"] for line in lines(tmp_path, "one")] == ["again", "ended well"]
    assert len(told) == 1


def test_on_s3_lines_are_sent_in_pieces_that_make_the_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_LOG_SECONDS", "0.2")
    run, told = a_run(f"{s3}/runs/demo"), list[str]()
    with log.kept(run, "one", told.append) as kept:
        kept(Noted("first"))
        until = time.monotonic() + 30
        while not sent(run) and time.monotonic() < until:
            time.sleep(0.05)
        assert sent(run) == ["one.000001.jsonl"]  # while the process goes on
        kept(Noted("second"))
    whole = b"".join(storage.read_bytes(run.path("log", name)) for name in sent(run))
    assert [line["message"] for line in parsed(whole)] == ["first", "second", "ended well"]
    assert sent(run)[-1] in ("one.000002.jsonl", "one.000003.jsonl")
    assert told == []


def test_on_s3_the_pieces_of_a_long_run_are_few_and_a_warning_comes_soon(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_LOG_SECONDS", "0.1")
    monkeypatch.setattr(journal, "LAZY", 1e6)  # as of a run of days
    run, told = a_run(f"{s3}/runs/demo"), list[str]()
    began = time.monotonic()
    with log.kept(run, "one", told.append) as kept:
        for number in range(10):
            kept(Noted(f"line {number}"))
            time.sleep(0.1)
        assert sent(run) == []
        kept(Warned("look"))
        until = time.monotonic() + 30
        while not sent(run) and time.monotonic() < until:
            time.sleep(0.05)
        first = parsed(storage.read_bytes(run.path("log", "one.000001.jsonl")))
        assert first[-1]["message"] == "look"
        kept(Noted("the last"))
    assert time.monotonic() - began < log.LONGEST_S / 2  # nor does the end wait
    assert len(sent(run)) == 2
    assert told == []


def test_how_fast_ranks_are_is_written_now_and_then_and_told_each_time(tmp_path: Path) -> None:
    heard: list[Event] = []
    with log.kept(a_run(tmp_path), "driver-0003", lambda text: None) as kept:
        hear = kept.hearing(heard.append)
        for phase in ("dense", "rounds/01"):
            for step in range(5, 50, 5):
                for rank in (0, 1):
                    hear(Paced(phase, step, rank, 100.0, 0.5, 0, 0))
    written = lines(tmp_path, "driver-0003")[:-1]
    found = [(line["data"]["phase"], line["data"]["rank"], line["step"]) for line in written]
    assert found == [("dense", 0, 5), ("dense", 1, 5), ("rounds/01", 0, 5), ("rounds/01", 1, 5)]
    assert len(heard) == 2 * 9 * 2


def test_a_worker_leaves_what_the_driver_writes_to_it(tmp_path: Path) -> None:
    heard: list[Event] = []
    events = [Noted("began"), Stepped("dense", 5, 10), Paced("dense", 5, 0, 100.0, 0.5, 0, 0)]
    with log.kept(a_run(tmp_path), "one", lambda text: None, 0, 1) as kept:
        for event in events:
            kept.hearing(heard.append, without=(Stepped, Paced))(event)
    assert heard == events
    assert [line["event"] for line in lines(tmp_path, "one")] == ["Noted", "Ended"]


def test_lines_wait_for_a_store_that_is_away(s3: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, told = a_run(f"{s3}/runs/demo"), list[str]()
    monkeypatch.setenv("SECATEUR_LOG_SECONDS", "0.1")
    monkeypatch.setenv("SECATEUR_STORAGE_RETRIES", "0")
    with log.kept(run, "one", told.append) as kept:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        boto.client.cache_clear()
        kept(Noted("kept back"))
        until = time.monotonic() + 30
        while not told and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)  # several tries
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
        boto.client.cache_clear()
        kept(Noted("later"))
    assert len(told) == 1
    whole = b"".join(storage.read_bytes(run.path("log", name)) for name in sent(run))
    assert [line["message"] for line in parsed(whole)] == ["kept back", "later", "ended well"]


def test_the_oldest_lines_go_where_too_many_wait(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST_WAITING", 1000)  # some four lines
    run, told = a_run(f"{s3}/runs/demo"), list[str]()
    with log.kept(run, "one", told.append) as kept:
        for step in range(10):
            kept(Noted(f"line {step}"))
    found = parsed(storage.read_bytes(run.path("log", "one.000001.jsonl")))
    assert found[0]["message"].endswith("lines before these were dropped")
    assert int(found[0]["message"].split()[0]) + len(found) - 1 == 11
    assert [line["message"] for line in found[-2:]] == ["line 9", "ended well"]


def test_a_store_that_hangs_does_not_hold_up_the_end(s3: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "CLOSING_S", 0.5)
    run, told, proxy = a_run(f"{s3}/runs/demo"), list[str](), Proxy(moto)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        boto.client.cache_clear()
        with log.kept(run, "one", told.append):
            proxy.fault = Fault("hang", times=50, method="PUT")
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert "at the end" in told[0]
    finally:
        proxy.close()


def alone() -> LocalEngine:
    return LocalEngine(World(0, 1, torch.device("cpu")))


def test_a_run_keeps_logs_of_its_driver_and_its_rank(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"tracking.enabled": False, "prune.rounds": 1})
    with Display() as display:
        stages.run(config, alone(), display)
    root = f"{config.runs_dir}/{config.name}"
    assert storage.list_files(f"{root}/log") == [
        "0001-dense-1-rank-0.jsonl",
        "0001-rounds-1-rank-0.jsonl",
        "driver-0001.jsonl",
    ]
    driver, rank = lines(root, "driver-0001"), lines(root, "0001-rounds-1-rank-0")
    assert [line["data"]["stage"] for line in driver if line["event"] == "StageBegun"][:2] == ["shards", "dense"]
    assert {line["rank"] for line in driver} == {None}
    assert {(line["rank"], line["attempt"]) for line in rank} == {(0, 1)}
    assert {"RoundBegun", "EpochEnded", "Ended"} <= {line["event"] for line in rank}
    assert {"RoundBegun", "EpochEnded", "Ended"} <= {line["event"] for line in driver}
    stages.run(config, alone(), Display())
    assert "driver-0002.jsonl" in storage.list_files(f"{root}/log")  # a driver never writes into another's


def test_a_run_whose_log_cannot_be_written_ends_well(tiny: Callable[..., Config]) -> None:
    config, events = tiny(**{"tracking.enabled": False, "prune.rounds": 1}), list[Event]()
    root = Path(config.runs_dir, config.name)
    root.mkdir(parents=True)
    (root / "log").write_text("")
    result = stages.run(config, alone(), events.append)
    assert result.weights_kept > 0
    told = [event.text for event in events if isinstance(event, Warned) and "cannot be written" in event.text]
    assert len(told) == 3  # one each: the driver, and the rank in two stages


def test_a_mistake_is_the_last_line(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"tracking.enabled": False, "dense.batch_size": 10**6})
    with pytest.raises(UserError):
        stages.run(config, alone(), Display())
    last = lines(f"{config.runs_dir}/{config.name}", "driver-0001")[-1]
    assert (last["level"], last["event"]) == ("ERROR", "Ended")
    assert last["message"].startswith("ended by UserError: ")
    assert "error" not in last  # no traceback of a mistake
