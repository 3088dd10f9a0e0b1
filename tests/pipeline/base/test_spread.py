"""Work by several real processes: in order, with one message for what goes wrong, and nobody left behind."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, environment

from pipeline.base.errors import Lost, UserError
from pipeline.base.spread import here, processes

NOW = 0.0  # seconds of work from which processes are worth it


def square(number: int) -> tuple[int, int]:
    """Later for smaller numbers, and by whom."""
    time.sleep(0.01 * (8 - number % 8))
    return number**2, os.getpid()


def refuse(number: int) -> int:
    if number == 3:
        raise UserError(f"no {number}: take another")
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def wait_or_tell(given: tuple[Path, int]) -> int:
    """The item's number; the third and later wait for ever."""
    folder, number = given
    with (folder / "pids").open("a") as stream:
        stream.write(f"{os.getpid()}\n" if mp.parent_process() else "")
    if number > 1:
        time.sleep(600)
    return number


def wait(path: str) -> None:
    """Note who waits, and wait for ever, but for the first."""
    if path:
        Path(path, str(os.getpid())).touch()
        time.sleep(600)


def test_results_come_in_the_order_of_the_items() -> None:
    found = [*processes(2, NOW)(square, range(20), 20)]
    assert [result for result, _ in found] == [number**2 for number in range(20)]
    assert len({pid for _, pid in found} - {os.getpid()}) == 2
    assert [*here(refuse, [1, 2], 2)] == [1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_work_of_a_moment_stays_in_this_process(workers: int) -> None:
    found = [*processes(workers, NOW if workers == 1 else 60.0)(square, range(4), 4)]
    assert {pid for _, pid in found} == {os.getpid()}


def test_a_mistake_is_raised_as_it_was() -> None:
    with pytest.raises(UserError, match=r"^no 3: take another$"):
        [*processes(2, NOW)(refuse, range(10), 10)]


def test_a_process_that_is_lost_is_one_message() -> None:
    with pytest.raises(Lost, match=r"a process of this machine's was lost.*the same command goes on"):
        [*processes(2, NOW)(die, range(10), 10)]


def test_closing_it_ends_what_is_under_way(tmp_path: Path) -> None:
    results = processes(2, NOW)(wait_or_tell, [(tmp_path, number) for number in range(6)], 6)
    assert next(results) == 0
    assert next(results) == 1
    results.close()
    assert not [pid for pid in map(int, (tmp_path / "pids").read_text().split()) if Path("/proc", str(pid)).exists()]


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pipeline.base.spread import processes; import test_spread\n"
        "print('began', flush=True)\n"
        "print(*processes(2, 0.0)(test_spread.refuse, [0, 1, 2], 3))\n"
    )
    path = f"{ROOT}{os.pathsep}{Path(__file__).parent}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment(), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "began\n0 1 2\n"), done.stderr


def test_when_the_program_is_killed_its_processes_end(tmp_path: Path) -> None:
    script = (
        "from pipeline.base.spread import processes; import test_spread, sys\n"
        f"[*processes(2, 0.0)(test_spread.wait, ['', *[{str(tmp_path)!r}] * 4], 5)]\n"
    )
    path = f"{ROOT}{os.pathsep}{Path(__file__).parent}{os.pathsep}{ROOT / 'tests'}"
    program = subprocess.Popen([sys.executable, "-c", script], env={**environment(), "PYTHONPATH": path})
    try:
        deadline = time.monotonic() + 120
        while len(waiting := [int(file.name) for file in tmp_path.iterdir()]) < 2:
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        program.kill()
        program.wait()
    while any(Path("/proc", str(pid)).exists() for pid in waiting):
        assert time.monotonic() < deadline
        time.sleep(0.05)
