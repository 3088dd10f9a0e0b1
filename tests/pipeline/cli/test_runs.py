"""`list`, `status`, `logs`, `watch`: what a run's folder says, from outside and without touching it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_files import begin, config, put, result, taken
from support import ROOT, environment

from pipeline.base.errors import UserError
from pipeline.cli import runs, status, watch
from pipeline.cli.messages import PASSING
from pipeline.run import log
from pipeline.run.events import Outlined, RoundBegun, StageBegun, Stepped
from pipeline.run.records import StageMarker
from pipeline.run.state import Run, now_ms

HOLD = (
    "import sys; from pipeline.run import lease\n"
    "with lease.hold(sys.argv[1], 60, lambda: None, print): print('held', flush=True); sys.stdin.read()\n"
)


@contextmanager
def held(root: Path) -> Iterator[int]:
    """Another process holds the run's lease; its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], cwd=ROOT, env=environment(), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def stopped(tmp_path: Path, name: str = "half") -> Path:
    """A run that stopped in its second round."""
    root = begin(config(tmp_path, name))
    for stage in ("shards", "dense"):
        put(root / stage / "finished.json", StageMarker("x", 2.0, 1_760_000_060_000))
    with log.kept(Run(str(root), 1), "driver-0001", print) as kept:
        kept(Outlined(("shards", "dense", "rounds", "final"), 2, 100, 100, 0, True))
        kept(StageBegun("rounds", "rounds", False, 3, 4))
        kept(RoundBegun("rounds/02", 0.25, 100, 0, 0.9, {}, False))
        kept(Stepped("rounds/02", 7, 10))
    return root


def finished(tmp_path: Path, name: str) -> Path:
    made = config(tmp_path, name)
    root = begin(made)
    put(root / "result.json", taken(result(made)))
    return root


def test_a_list_has_a_row_for_each_run_also_for_nested_and_damaged_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tmp_path, "whole")
    stopped(tmp_path / "paper")
    broken = begin(config(tmp_path, "broken"))
    (broken / "run.json").write_text("{")
    (tmp_path / "mlartifacts" / "1").mkdir(parents=True)
    begin(config(tmp_path / "mlartifacts" / "1", "artifacts"))
    runs.show(str(tmp_path), as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"whole", "half", "broken"}
    assert (rows["whole"]["stage"], rows["whole"]["verdict"]) == ("finished", "no loss")
    assert rows["whole"]["compression"] == pytest.approx(13.7, abs=0.05)
    assert (rows["half"]["stage"], rows["half"]["running"]) == ("rounds", False)
    assert "run.json" in rows["broken"]["problem"]
    runs.show(str(tmp_path), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "lenet_300_100" in line]) == 2
    assert any(line.startswith("warning: ") and "run.json" in line for line in lines)
    with pytest.raises(UserError, match="holds no run"):
        runs.show(str(tmp_path / "nowhere"), as_json=False)


def test_a_status_says_where_a_run_stands_and_who_is_at_it(tmp_path: Path) -> None:
    root = stopped(tmp_path)
    found = status.of(str(root))
    assert (found.stage, found.rounds, found.held_by) == ("rounds", 2, None)
    assert found.doing == "rounds/02: step 7 of 10"
    text = "\n".join(status.lines(found))
    assert "rounds  stopped here: 0 of 2 rounds done" in text
    assert "at it: nobody; the command that started it goes on" in text
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with held(root) as pid:
        assert status.of(str(root)).held_by == f"process {pid} on this machine"
        assert runs.row(str(root)).running
    assert status.of(str(root)).held_by is None  # it was killed, and its lease.json is still there
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path in before}
    assert {path for path in after if path.is_file() and before[path] != after[path]} == set()
    with pytest.raises(UserError, match="is not a run"):
        status.of(str(tmp_path))


def test_a_status_says_why_the_last_process_ended(tmp_path: Path) -> None:
    root = stopped(tmp_path)
    put(root / "ended.json", {"how": "failed", "why": "UserError: target.compression=1e9: too much", "ms": 5})
    said = status.lines(status.of(str(root)))
    assert "the last process failed: target.compression=1e9: too much" in said
    with held(root):
        assert not [line for line in status.lines(status.of(str(root))) if line.startswith("the last process")]


def test_a_process_that_has_the_number_of_a_dead_writer_is_not_at_the_run(tmp_path: Path) -> None:
    root = stopped(tmp_path)
    with held(root):
        lease = json.loads((root / "lease.json").read_text())
    reused = {**lease, "pid": os.getpid(), "since_ms": 1_000_000_000_000}  # long before this process began
    (root / "lease.json").write_text(json.dumps(reused))
    assert status.of(str(root)).held_by is None
    (root / "lease.json").write_text(json.dumps({**reused, "since_ms": now_ms()}))
    assert status.of(str(root)).held_by == f"process {os.getpid()} on this machine"


def test_watching_a_run_ends_with_it_and_says_whether_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch.watch(str(stopped(tmp_path))) == PASSING
    assert "nobody is at the run" in capsys.readouterr().out
    assert watch.watch(str(finished(tmp_path, "whole"))) == 0
    assert "finished: no loss at 13.7" in capsys.readouterr().out


def test_a_log_is_printed_as_sentences_or_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(stopped(tmp_path))
    watch.print_log(root, follow=False, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "driver: stage 3 of 4: rounds: started",
        "driver: rounds/02: 100 weights kept (25.00%), val 90.00%",
        "driver: rounds/02: 7/10",
        "driver: ended well",
    ]
    watch.print_log(root, follow=True, as_json=True)  # nobody is at it, so it ends
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in printed] == ["Outlined", "StageBegun", "RoundBegun", "Stepped", "Ended"]
    with pytest.raises(UserError, match="is not a run"):
        watch.print_log(str(tmp_path), follow=False, as_json=False)


def test_a_run_that_measures_its_latency_table_stands_there(tmp_path: Path) -> None:
    root = begin(config(tmp_path, "timed"))
    put(root / "shards/finished.json", StageMarker("x", 2.0, 1_760_000_060_000))
    assert runs.stage(Run(str(root), 0)) == "dense"  # a run without such a stage
    (root / "latency").mkdir()
    (root / "latency/table.json").write_text("{}")
    assert runs.stage(Run(str(root), 0)) == "latency"
    put(root / "latency/finished.json", StageMarker("x", 2.0, 1_760_000_070_000))
    assert runs.stage(Run(str(root), 0)) == "dense"
