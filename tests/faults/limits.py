"""Many cases judged in one child process that has little memory, and for each case little time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT, environment

from pipeline.cli.messages import one_message

MEMORY = 10 * 2**30  # bytes of address space; torch itself maps some
SECONDS = 60  # of processor time for a case; a usual one takes under two
WALL_SECONDS = 300  # and by the clock, on a busy machine


class Hang(BaseException):
    """A case took too long; no handler of ours catches it."""


def judged(program: str, seed: int, cases: range, folder: Path) -> Counter[str]:
    """Outcomes of cases, counted; AssertionError that names each case whose outcome is none that is allowed."""
    command = [sys.executable, "-m", f"faults.{program}", str(seed), str(cases.start), str(cases.stop), str(folder)]
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    # What Python writes to a file is there even if the process is killed.
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, check=False, cwd=folder,
            timeout=60 + 20 * len(cases), env={**environment(), "PYTHONPATH": path},
        )  # fmt: skip
        out.seek(0)
        lines = [json.loads(line) for line in out]
    assert process.returncode == 0, (lines[-1:], process.stderr[-3000:])
    wrong = [line for line in lines if line["outcome"].startswith("WRONG")]
    assert not wrong, "\n".join(f"seed {seed}, case {line['case']}: {line['outcome']}" for line in wrong)
    assert [line["case"] for line in lines] == list(cases)
    return Counter(line["outcome"] for line in lines)


def main(judge: Callable[[int, int, Path], str]) -> None:
    """The child: a line of JSON for each case."""
    seed, first, last, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    for case in range(first, last):
        signal.alarm(WALL_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        here = folder / f"case-{case}"
        here.mkdir()
        try:
            os.chdir(here)
            outcome = judge(seed, case, here)
        except Hang:
            outcome = f"WRONG: hangs\n{traceback.format_exc()}"
        except Exception:  # noqa: BLE001 - that nothing else comes out is what is tested
            outcome = f"WRONG: {traceback.format_exc()}"
        finally:
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"case": case, "outcome": outcome}), flush=True)


def _hang(*_: object) -> None:
    raise Hang


def command(action: Callable[[], Any]) -> str | None:
    """Carry out what a command line does: None where it ends well, or its one message.

    The exit code is that of a mistake, or of what may pass.
    """
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with one_message():
                action()
        except SystemExit as error:
            code = error.code
    if code is None:
        return None
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
    assert code in (2, 75), (code, lines)
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: "), lines
    assert len(lines[0]) < 3000, lines
    return lines[0]
