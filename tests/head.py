"""A real Ray head in a network of its own, with token authentication; commands run inside it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, alone_on_the_network, environment, processes_in

DASHBOARD = "http://127.0.0.1:8265"


class Head:
    """A real `ray start --head` in a network of its own; commands run inside it."""

    def __init__(self, folder: Path) -> None:
        script = "ray start --head --disable-usage-stats --num-cpus=2 --temp-dir={0} --dashboard-port=8265 --block"
        self.env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        prefix = alone_on_the_network()
        if not prefix:
            pytest.skip("this system gives no network of its own (unshare -n), which a Ray head is started in")
        self.process = subprocess.Popen(
            [*prefix, "sh", "-c", f"{script.format(folder)} >{folder}/head.log 2>&1"],
            env=self.env, cwd=ROOT, start_new_session=True,
        )  # fmt: skip

    def wait_until_it_answers(self, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while (answer := self.run("ray", "job", "list", f"--address={DASHBOARD}")).returncode:
            assert time.monotonic() < deadline, answer.stderr
            time.sleep(1)

    def run(self, *command: str, timeout: float = 400, **extra: str) -> Any:
        inside = ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", *command]
        return subprocess.run(
            inside, env={**self.env, **extra}, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
        )

    def processes(self, words: str) -> list[int]:
        """Processes in the head's network whose command holds `words`."""
        return processes_in("net", self.process.pid, words)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


@contextmanager
def answering_head() -> Iterator[Head]:
    """A Ray head that answers, in a network of its own, until the block ends."""
    # Ray's sockets lie in its folder, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        started = Head(Path(folder))
        try:
            started.wait_until_it_answers()
            yield started
        finally:
            started.close()
