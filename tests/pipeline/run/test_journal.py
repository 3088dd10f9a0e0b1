"""Journals: real files, a real process that is killed, and a server that speaks S3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import few_samples
import pytest
from support import ROOT, environment

from pipeline import storage
from pipeline.base.errors import RunStopped, UserError
from pipeline.run import journal
from pipeline.run.journal import Journal
from pipeline.run.lease import Lease
from pipeline.run.records import BeforeRetraining as Row
from pipeline.run.state import Run

ROWS = [Row(top1=number / 100, loss=0.1) for number in range(100)]


def on_s3(bucket: str, fence: int = 1) -> Run:
    run = Run(f"{bucket}/runs/r", fence)
    storage.write_json(run.path("lease.json"), Lease(fence, seconds=600).to_json())  # longer than any test
    return run


def write(run: Run, rows: list[Row]) -> None:
    with Journal(run, "rows") as lines:
        for row in rows:
            lines.add(row)


def test_what_was_added_is_read_in_its_order(tmp_path: Path) -> None:
    run = few_samples.run_in(tmp_path)
    assert [*journal.read(run, Row, "rows")] == []
    write(run, [])
    assert storage.list_files(run.path("rows")) == []  # a journal without a line leaves no file
    write(run, ROWS[:3])
    write(run, ROWS[3:5])
    assert [*journal.read(run, Row, "rows")] == ROWS[:5]
    assert storage.list_files(run.path("rows")) == ["000001-000001.jsonl", "000001-000002.jsonl"]
    first = (tmp_path / "rows/000001-000001.jsonl").read_text()
    assert first == '{"top1":0.0,"loss":0.1}\n{"top1":0.01,"loss":0.1}\n{"top1":0.02,"loss":0.1}\n'


def test_files_are_read_by_number_and_others_passed_over(tmp_path: Path) -> None:
    run = few_samples.run_in(tmp_path)
    for name, row in (("1000000-000001.jsonl", 2), ("000009-1000000.jsonl", 1), ("000009-999999.jsonl", 0)):
        run.commit_bytes(b'{"top1": %d, "loss": 0}\n' % row, "rows", name)
    run.commit_bytes(b"not ours", "rows", "notes.txt")
    assert [row.top1 for row in journal.read(run, Row, "rows")] == [0.0, 1.0, 2.0]


def test_a_torn_last_line_is_dropped_and_nothing_is_written_behind_it(tmp_path: Path) -> None:
    run = few_samples.run_in(tmp_path)
    write(run, ROWS[:3])
    file = tmp_path / "rows/000001-000001.jsonl"
    whole = file.read_bytes()
    for left in range(len(whole) - 25, len(whole)):  # at any byte of the last line
        file.write_bytes(whole[:left])
        assert [*journal.read(run, Row, "rows")] == ROWS[:2]
    write(run, ROWS[5:6])
    assert file.read_bytes() == whole[:-1]
    assert [*journal.read(run, Row, "rows")] == [*ROWS[:2], ROWS[5]]


@pytest.mark.parametrize("line", [b'{"top1": 1, "lo\n', b'{"top1": 1}\n', b"\xff\n", b"[]\n"])
def test_a_damaged_line_is_a_user_error_that_names_it(line: bytes, tmp_path: Path) -> None:
    run = few_samples.run_in(tmp_path)
    write(run, ROWS[:2])
    file = tmp_path / "rows/000001-000001.jsonl"
    file.write_bytes(file.read_bytes() + line)
    with pytest.raises(UserError, match=r"000001-000001\.jsonl.*line 3"):
        [*journal.read(run, Row, "rows")]


ADD = (
    "import sys; from pipeline.run.journal import Journal; from pipeline.run.state import Run\n"
    "from pipeline.run.records import BeforeRetraining as Row\n"
    "with Journal(Run(sys.argv[1], 1), 'rows') as lines:\n"
    "    for number in range(10**9):\n"
    "        lines.add(Row(top1=float(number), loss=0.1))\n"
    "        print(number, flush=True)\n"
)


def test_all_that_a_killed_process_had_added_is_found(tmp_path: Path) -> None:
    run = few_samples.run_in(tmp_path / "run")
    log = tmp_path / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", ADD, run.root], cwd=ROOT, env=environment(), stdout=stream)
        try:
            while log.stat().st_size < 5000:
                assert process.poll() is None
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    told = [int(text) for text in log.read_text().rpartition("\n")[0].splitlines()]
    found = [int(row.top1) for row in journal.read(run, Row, "rows")]
    assert found[: len(told)] == told
    assert found == [*range(len(found))]
    assert len(found) <= len(told) + 1


def test_a_writer_whose_run_was_taken_over_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SYNC_S", 0.0)
    run = few_samples.run_in(tmp_path)
    with Journal(run, "rows") as lines:
        lines.add(ROWS[0])
        storage.write_json(run.path("lease.json"), Lease(2).to_json())
        with pytest.raises(RunStopped, match="was taken over"):
            lines.add(ROWS[1])
    assert [*journal.read(run, Row, "rows")] == ROWS[:1]


def test_on_s3_lines_that_come_meanwhile_go_in_one_file(s3: str) -> None:
    run = on_s3(s3)
    write(run, ROWS)
    write(run, ROWS[:1])
    assert [*journal.read(run, Row, "rows")] == [*ROWS, ROWS[0]]
    files = storage.list_files(run.path("rows"))
    assert len(files) <= 30  # and no line waits for a later one: see below
    assert sum(storage.size(run.path("rows", name)) for name in files) == sum(
        len(f'{{"top1":{row.top1},"loss":0.1}}\n') for row in [*ROWS, ROWS[0]]
    )


def test_on_s3_a_line_does_not_wait_for_the_next(s3: str) -> None:
    run, seen = on_s3(s3), 0
    with Journal(run, "rows") as lines:
        for count in (1, 2, 3):
            lines.add(ROWS[count - 1])
            deadline = time.monotonic() + 60
            while (seen := len([*journal.read(run, Row, "rows")])) < count and time.monotonic() < deadline:
                pass
    # An error of the thread was raised where the block ended.
    assert seen == 3
    assert [*journal.read(run, Row, "rows")] == ROWS[:3]
    assert len(storage.list_files(run.path("rows"))) == 3


def test_on_s3_a_file_is_fetched_once(s3: str) -> None:
    """MLflow is brought up to date every few seconds, by all that a run has written so far."""
    run = on_s3(s3)
    for row in ROWS[:3]:
        write(run, [row])
    before = journal._remembered.cache_info()
    assert [*journal.read(run, Row, "rows")] == ROWS[:3]
    write(run, [ROWS[3]])
    assert [*journal.read(run, Row, "rows")] == ROWS[:4]
    after = journal._remembered.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (4, 3)
    storage.write_bytes(run.path("rows/000001-000001.jsonl"), b'{"top1":0.5,"loss":2.5}\n')  # the folder made anew
    assert [*journal.read(run, Row, "rows")] == [Row(top1=0.5, loss=2.5), *ROWS[1:4]]


def test_on_s3_lines_of_a_lazy_journal_wait_for_each_other_and_not_for_its_end(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LAZY", 1e6)  # as of one that is hours old: a minute
    run = on_s3(s3)
    began = time.monotonic()
    with Journal(run, "rows", lazy=True) as lines:
        for row in ROWS:
            lines.add(row)
            time.sleep(0.01)
    assert time.monotonic() - began < journal.LAZY_S / 2
    assert [*journal.read(run, Row, "rows")] == ROWS
    assert len(storage.list_files(run.path("rows"))) == 1


def test_on_s3_the_thread_s_error_is_raised_where_lines_are_added(s3: str) -> None:
    run = on_s3(s3)
    storage.write_json(run.path("lease.json"), Lease(2).to_json())
    with pytest.raises(RunStopped, match="was taken over"), Journal(run, "rows") as lines:
        lines.add(ROWS[0])

    def stopped() -> None:
        with Journal(run, "rows") as lines:
            lines.add(ROWS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # it is told, rather than what comes of it
        stopped()
    assert storage.list_files(run.path("rows")) == []


def test_a_copy_has_the_files_of_all_folders_below(tmp_path: Path) -> None:
    source, target = few_samples.run_in(tmp_path / "a"), few_samples.run_in(tmp_path / "b")
    for key in ("one", "two"):
        with Journal(source, "rows", key) as lines:
            lines.add(ROWS[0])
    journal.copy(source, target, "rows")
    journal.copy(source, target, "nothing")
    for key in ("one", "two"):
        assert [*journal.read(target, Row, "rows", key)] == ROWS[:1]
    with Journal(target, "rows", "one") as lines:
        lines.add(ROWS[1])
    journal.copy(source, target, "rows")  # what is there stays
    assert [*journal.read(target, Row, "rows", "one")] == ROWS[:2]


def test_a_full_disk_is_one_message() -> None:
    full = storage.appending("/dev/full")
    with pytest.raises(UserError, match="no space left to write '/dev/full': free space"):
        full.write(b"x")
    full.close()
