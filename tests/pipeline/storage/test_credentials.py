"""Credentials for S3 that fail after they have worked: refused by the store, or not renewed by who renews them."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from faults.proxy import Fault, Proxy

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.storage import s3 as boto


@pytest.fixture
def proxy(s3: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """S3 is reached through it from here on, and has been reached; s3/x holds "x"."""
    made = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    boto.client.cache_clear()
    storage.write_bytes(f"{s3}/x", b"x")
    yield made
    made.close()


@contextlib.contextmanager
def when_tried_again(name: str, then: Callable[[], object]) -> Iterator[None]:
    """Call `then` as soon as storage has tried once more after an error of that name."""
    before, left = storage.retries()[name], threading.Event()

    def watch() -> None:
        while storage.retries()[name] == before and not left.wait(0.001):
            pass
        then()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        left.set()
        watching.join()


def expired(code: str = "ExpiredToken", **changes: Any) -> Fault:
    return Fault("refuse", **{"times": 3, "method": "", "status": 400, "code": code, **changes})


@pytest.mark.parametrize("code", ["ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"])
def test_credentials_that_have_expired_are_waited_for(proxy: Proxy, s3: str, code: str) -> None:
    before = storage.retries()
    for act in (
        lambda: storage.write_bytes(f"{s3}/y", b"y"),
        lambda: storage.read_bytes(f"{s3}/x"),
        lambda: storage.list_files(s3),
        lambda: storage.remove(f"{s3}/y"),
    ):
        proxy.fault = expired(code)
        act()
    assert (storage.retries() - before)[code] == 12
    proxy.fault, proxy.made = expired(code), 0
    assert storage.exists(f"{s3}/x")  # a HEAD, whose answer has no body to tell the code by
    assert proxy.made >= 3  # botocore asks for the bucket's region, too


def test_credentials_that_stay_expired_are_one_message(proxy: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_STORAGE_RETRIES", "2")
    proxy.fault = expired(times=-1)
    words = r"/x' had no good credentials in 3 tries, the last ended with ExpiredToken .*: see why they are not renewed"
    with pytest.raises(UserError, match=rf"{words} .*AWS_PROFILE.* then run the same command again; .*kept"):
        storage.read_bytes(f"{s3}/x")
    assert proxy.made == 3


def test_credentials_that_have_never_worked_are_not_waited_for(
    proxy: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boto, "_served", False)
    proxy.fault = expired(times=-1)
    with pytest.raises(UserError, match=r"does not accept the credentials \(ExpiredToken\): renew them"):
        storage.read_bytes(f"{s3}/x")
    assert proxy.made == 1


def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start of a process that finds none anywhere; it waits between its tries as long as it really does."""
    monkeypatch.setattr(boto, "_served", False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "SECATEUR_STORAGE_BACKOFF_S"):
        monkeypatch.delenv(name)
    boto.client.cache_clear()


def test_no_credentials_at_all_are_one_message_within_seconds(
    proxy: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_credentials(monkeypatch)
    began = time.monotonic()
    with pytest.raises(storage.NoAccess, match=r"/x': no credentials for S3 \(Unable to .*: give them by a role"):
        storage.read_bytes(f"{s3}/x")
    assert time.monotonic() - began < 10


def test_credentials_that_a_new_process_finds_a_moment_later_are_used(
    proxy: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine's metadata service was slow to answer once."""
    no_credentials(monkeypatch)

    def found() -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")

    with when_tried_again("NoCredentialsError", found):
        assert storage.read_bytes(f"{s3}/x") == b"x"


def test_a_file_of_credentials_is_read_again(
    proxy: Proxy, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is empty for a while, as where a script writes it anew."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    boto.client.cache_clear()

    def write(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    def key() -> str:
        return str(boto.client().generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "x"}))

    write("OLD")
    assert storage.read_bytes(f"{s3}/x") == b"x"
    assert "OLD" in key()
    before = storage.retries()
    file.write_text("")
    proxy.fault = expired(times=1)
    with when_tried_again("NoCredentialsError", lambda: write("NEW")):
        assert storage.read_bytes(f"{s3}/x") == b"x"
    assert (storage.retries() - before)["NoCredentialsError"] >= 1
    assert "NEW" in key()


class Issuer:
    """Gives credentials, as a container's role has them, which every request renews; may be told to fail."""

    def __init__(self) -> None:
        self.failing = 0  # so many answers from now on are HTTP 500
        self.minutes = 5.0  # until what it gives expires; botocore renews within the last 10
        self.asked = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                issuer.asked += 1
                issuer.failing -= 1
                expires = datetime.now(UTC) + timedelta(minutes=issuer.minutes)
                given = {"AccessKeyId": "k", "SecretAccessKey": "s", "Token": "t", "Expiration": expires.isoformat()}
                body = json.dumps(given).encode()
                self.send_response(500 if issuer.failing >= 0 else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def issuer(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    made = Issuer()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{made.server.server_port}/")
    boto.client.cache_clear()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.parametrize("first", [False, True])
def test_a_service_of_credentials_that_is_away_is_waited_for(
    issuer: Issuer, s3: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a new process, as a worker that was started again: the service is away for a moment only."""
    if first:
        monkeypatch.setattr(boto, "_served", False)
    else:
        assert storage.read_bytes(f"{s3}/x") == b"x"
    before, issuer.failing = storage.retries(), 4  # botocore asks it three times
    assert storage.read_bytes(f"{s3}/x") == b"x"
    assert (storage.retries() - before)["CredentialRetrievalError"] == 1


def test_a_service_that_gives_what_has_expired_is_waited_for(issuer: Issuer, s3: str) -> None:
    assert storage.read_bytes(f"{s3}/x") == b"x"
    before, issuer.minutes = storage.retries(), -1.0
    started = time.monotonic()
    with when_tried_again("RuntimeError", lambda: setattr(issuer, "minutes", 60.0)):
        assert storage.read_bytes(f"{s3}/x") == b"x"
    assert time.monotonic() - started < 60
    assert (storage.retries() - before)["RuntimeError"] >= 1


def test_a_service_that_is_away_at_the_start_is_one_message(
    issuer: Issuer, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boto, "_served", False)
    issuer.failing = 100
    with pytest.raises(UserError, match=r"no credentials for S3 \(Error when retrieving credentials from container"):
        storage.read_bytes(f"{s3}/x")
    assert issuer.asked == 3 * 4  # botocore asks it three times
