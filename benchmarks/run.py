"""Runs benchmarks one after the other, and keeps what each printed in benchmarks/README.md.

    python benchmarks/run.py NAME [NAME ...]        # NAME of bench_NAME.py, with options: "scan --full"

A benchmark that ends with an error keeps its old table; the others still run. Exit code 1 says that one did.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
README = HERE / "README.md"
PACKAGES = ("torch", "ray", "webdataset", "mlflow")


def main() -> int:
    names = sys.argv[1:]
    if not names:
        print(__doc__)
        return 2
    failed, where = [], place()
    for name in names:
        text = measured(name)
        if text is None:
            failed.append(name)
        else:
            README.write_text(replaced(README.read_text(), name.split()[0], section(name, where, text)))
    if failed:
        print(f"ended with an error, old tables kept: {', '.join(failed)}")
    return 1 if failed else 0


def measured(name: str) -> str | None:
    """What a benchmark prints; shown as it comes. None if it ends with an error."""
    program, *options = shlex.split(name)
    command = [sys.executable, str(HERE / f"bench_{program}.py"), *options]
    print(f"== {shlex.join(command[1:])}", flush=True)
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return "\n".join(lines).strip("\n") if process.returncode == 0 else None


def place() -> str:
    """When, at which commit and where it is measured. The tables that are kept change the working tree: ask before."""
    versions = ", ".join([f"Python {platform.python_version()}", *(f"{each} {version(each)}" for each in PACKAGES)])
    return f"{datetime.date.today()}, commit {commit()}, {machine()}; {versions}"


def section(name: str, where: str, text: str) -> str:
    """Of the README: when and where it was measured, by which command, then the tables."""
    program, *options = name.split()
    command = " ".join(["python", f"benchmarks/bench_{program}.py", *options])
    return f"{where}. By `{command}`:\n\n```\n{text}\n```\n"


def replaced(readme: str, name: str, text: str) -> str:
    """The README with this section under `## name`; a new one goes to the end."""
    heading = f"## {name}\n"
    before, found, rest = readme.partition(heading)
    after = re.split(r"^(?=## )", rest, maxsplit=1, flags=re.MULTILINE)[1:] if found else []
    return f"{before.rstrip()}\n\n{heading}\n{text}" + "".join(f"\n{each}" for each in after)


def commit() -> str:
    """Short; with a plus where files were changed since."""
    shown = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return shown.stdout.strip() or "unknown"


def machine() -> str:
    """Its processor, and how many cores this process may use."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return f"{found[1] if found else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    sys.exit(main())
