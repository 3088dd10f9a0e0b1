"""What a person opens: the report in a real browser, the MLflow UI over HTTP."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT, environment, program

QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run that MLflow knows of."""
    runs = tmp_path_factory.mktemp("ui") / "runs"
    small = ["dense.epochs=2", "retrain.epochs=1", "prune.rounds=2", "scan.levels=[0.5,0.1]", f"runs_dir={runs}"]
    done = program("pipeline", "run", "configs/demo.yaml", *small, ray=False)
    assert done.returncode == 0, done.stderr
    return runs / "demo"


def chromium(*args: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    command = [browser, *QUIET, f"--user-data-dir={folder / 'profile'}", *args]
    return subprocess.run(command, capture_output=True, check=True, timeout=120)


def test_the_report_opens_in_a_browser_and_is_drawn(run: Path, tmp_path: Path) -> None:
    address = (run / "report.html").as_uri()
    dom = chromium("--dump-dom", address, folder=tmp_path).stdout.decode()
    for words in ("Rounds", "Layers", "Sensitivity", "Weights before and after", "fc2.weight", "McNemar"):
        assert words in dom
    picture = tmp_path / "report.png"
    chromium(f"--screenshot={picture}", "--window-size=1200,2400", address, folder=tmp_path)
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (2400, 1200)
    assert len(np.unique(pixels[600:])) > 50  # figures, not an empty page


def test_the_ui_command_serves_mlflow(run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cluster", "ui", str(run.parent), "--port", str(port)]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    page = answer.read().decode()
                break
            except OSError:
                assert server.poll() is None, server.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert "MLflow" in page
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(120)
