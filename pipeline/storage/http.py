"""Files on a web server, to be read only: by ranged requests, as from S3."""

from __future__ import annotations

import functools
import io
from typing import Any, BinaryIO, NoReturn, cast
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions as failures

from pipeline.base.errors import UserError
from pipeline.storage import redirects, retry
from pipeline.storage.ranges import Body, RangeStream
from pipeline.storage.retry import Passing
from pipeline.storage.stat import Stat

_BUFFER = 2**20
_PASSING = {408, 429, 500, 502, 503, 504}


class _Status(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


_ERRORS = (failures.HTTPError, _Status)


@functools.cache
def _pool() -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=32)


def _request(method: str, url: str, headers: dict[str, str]) -> Any:
    """One request, redirects followed. Raises _Status where the answer is not 200, 206 or 416.

    Raises UserError where a redirect leads where it must not.
    """
    if urlsplit(url).username is not None:
        raise UserError(
            f"'{urlsplit(url).hostname}': a URL with a password would stand in config and log: leave it out"
        )
    answer, place = _answer(method, url, headers), url
    for _ in range(redirects.MOST):
        location = answer.get_redirect_location()
        if not location:
            break
        answer.drain_conn()
        answer.release_conn()
        place = redirects.follow(place, location)
        answer = _answer(method, place, headers)
    if answer.status not in (200, 206, 416):
        answer.drain_conn()
        answer.release_conn()
        raise _Status(answer.status)
    return answer


def _answer(method: str, url: str, headers: dict[str, str]) -> Any:
    return _pool().request(
        method, url, headers={"Accept-Encoding": "identity", **headers}, preload_content=False, redirect=False,
        timeout=urllib3.Timeout(connect=min(10.0, retry.timeout_s()), read=retry.timeout_s()),
        retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0),
    )  # fmt: skip


def _judge(url: str, error: Exception) -> Passing:
    if isinstance(error, failures.MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, _Status):
        if error.status in _PASSING:
            return Passing(str(error), retry.tries())
        if error.status in (404, 410):
            raise FileNotFoundError(f"'{url}' does not exist") from error
        if error.status == 412:
            raise UserError(f"'{url}' was changed while it was in use: whoever writes it must not, then run again")
        raise UserError(f"'{url}': the server answers {error}: check the address, and that it is open to all")
    if isinstance(error, failures.SSLError):
        raise UserError(f"'{url}': the server's certificate is not trusted ({error}): set SSL_CERT_FILE") from error
    if isinstance(error, failures.LocationValueError):
        raise UserError(f"'{url}' is no address: write http://host/path") from error
    return Passing(type(error).__name__, retry.tries())


def _version(answer: Any) -> str:
    return str(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")


def stat(url: str) -> Stat | None:
    """Size and version of a file, or None where there is none."""

    def head() -> Stat:
        answer = _request("HEAD", url, {})
        answer.release_conn()
        length = answer.headers.get("Content-Length", "")
        return Stat(int(length) if length.isdecimal() else -1, _version(answer))

    try:
        return retry.call(url, _judge, _ERRORS, head)
    except FileNotFoundError:
        return None


def read(url: str) -> bytes:
    """A whole file. Raises FileNotFoundError."""
    with open_range(url, 0, None, None) as stream:
        return stream.read()


def open_range(url: str, start: int, stop: int | None, version: str | None) -> BinaryIO:
    """A stream of bytes `start`..`stop`. Raises FileNotFoundError."""

    def fetch(first: int, last: int, known: str | None) -> Body | None:
        answer = _request("GET", url, {"Range": f"bytes={first}-{last - 1}"})
        if answer.status == 416:
            answer.release_conn()
            return None
        if answer.status != 206:
            answer.close()
            raise UserError(f"'{url}': the server gives no parts of a file (range requests), which shards are read by")
        if known is not None and _version(answer) != known:
            answer.close()
            raise _Status(412)
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if not size.isdecimal():
            answer.close()
            raise UserError(f"'{url}': the server does not say how large the file is (Content-Range), as it must")
        return Body(answer, _version(answer), int(size))

    return cast(BinaryIO, io.BufferedReader(RangeStream(url, fetch, _judge, _ERRORS, start, stop, version), _BUFFER))


def stats(folder: str) -> dict[str, Stat]:
    """A web server lists nothing."""
    raise UserError(f"'{folder}': a web server does not list its files: copy them, or name a folder on S3 or a disk")


folders = stats


def _read_only(url: str, *_: object) -> NoReturn:
    raise UserError(f"'{url}' can only be read: give a path, or a URL s3://bucket/key, to write to")


write = create = remove = remove_tree = remove_leftovers = _read_only
