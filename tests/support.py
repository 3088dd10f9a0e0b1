"""What tests share that is no fixture: programs run to their end, Ray in a network of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@cache
def alone_on_the_network() -> list[str]:
    """A command prefix that gives a program a network of its own with loopback only, or nothing if refused."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return []
    prefix = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    return prefix if tried.returncode == 0 else []


def environment(**extra: str) -> dict[str, str]:
    """The environment of a program under test: our venv first on the path, and factories of tests found.

    Its log leaves out no line, so that a test may wait for one.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {"PATH": path, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "COLUMNS": "160", "SECATEUR_LINE_SECONDS": "0"}
    return {**os.environ, **ours, **extra}


def program(*args: str, ray: bool = True, cwd: Path = ROOT, timeout: float = 400, **extra: str) -> Any:
    """Run `python -m ...` to its end; returns the completed process with its output as text."""
    prefix = alone_on_the_network() if ray else []
    command = [*prefix, sys.executable, "-m", *args]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, timeout=timeout, env=environment(**extra)
    )


# What programs under test need to reach a server that stands in for S3; it believes every key.
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
    "SECATEUR_STORAGE_BACKOFF_S": "0.01",
}

# Programs for a network that S3 is in and the test is not.
# Waits until a round has a whole checkpoint.
WATCH = (
    "import sys, time; from pipeline import storage\n"
    "steps = sys.argv[1] + '/rounds/01/steps'\n"
    "def ready(): return any(storage.exists(f'{steps}/{n}/manifest.json') for n in storage.list_folders(steps))\n"
    "while not ready(): time.sleep(0.05)\n"
)
# Makes a bucket.
MAKE_BUCKET = "from pipeline.storage import s3\ns3.client().create_bucket(Bucket='store')\n"
# And pushes shards into it.
PREPARE = f"{MAKE_BUCKET}import sys; from pipeline.data import push\npush.push(sys.argv[1], 's3://store/shards')\n"
FETCH = (
    "import sys; from pathlib import Path; from pipeline import storage\n"
    "for name in sys.argv[3:]: Path(sys.argv[2], name.replace('/', '-')).write_bytes(\n"
    "    storage.read_bytes(f'{sys.argv[1]}/{name}'))\n"
)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_moto(port: int, prefix: list[str] | None = None, host: str = "127.0.0.1") -> subprocess.Popen[bytes]:
    """moto's S3 server, once it listens, on a port of this machine or of the network of `prefix`; 10 names a page."""
    command = [*(prefix or []), sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment(MOTO_S3_DEFAULT_MAX_KEYS="10"),
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        if _listening(server.pid, port):
            return server
        time.sleep(0.05)
    server.kill()
    raise AssertionError(f"nothing listens, exit code {server.wait()}: {shlex.join(command)}")


def _listening(process: int, port: int) -> bool:
    """Whether anything listens on a port in the network that a process is in."""
    rows = [line.split() for line in Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]]
    return any(row[3] == "0A" and int(row[1].split(":")[1], 16) == port for row in rows)


def written_bytes() -> int:
    """What this process has handed to the system to write so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def processes_in(kind: str, of: int, words: str) -> list[int]:
    """Processes whose command holds `words`, in that namespace (net, pid) in which process `of` is."""
    space, found = os.readlink(f"/proc/{of}/ns/{kind}"), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns" / kind) == space:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found += [int(entry.name)] if words in command else []
    return found


def hearing_ctrl_c(command: list[str]) -> list[str]:
    """The command with SIGINT as on a terminal: what a script starts in the background inherits that it is ignored."""
    return ["env", "--default-signal=INT", *command]
