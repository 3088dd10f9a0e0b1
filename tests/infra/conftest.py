"""AWS as moto plays it, for the tests of infra/."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

REGION = "eu-central-1"


@pytest.fixture(scope="session")
def aws() -> Iterator[dict[str, str]]:
    """The environment in which boto3, Terraform and Ray find a moto server in place of AWS."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(server, url)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        yield kept | {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait(server: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(120):
        assert server.poll() is None, "moto's server ended at once"
        try:
            with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.25)
    raise AssertionError(f"moto's server does not answer at {url}")
