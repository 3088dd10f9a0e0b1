"""A remote object as a stream of ranged requests. After an error it goes on from the byte that was reached."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.storage.retry import Attempts, Judge

RANGE = 16 * 2**20  # bytes of one request
_PIECE = 2**17  # bytes read from a response at a time; a retry repeats at most so many


class Body(NamedTuple):
    """An open response: its stream, the object's version and size."""

    stream: Any
    version: str
    size: int


# (first byte, byte after the last, version or None for any) -> a response, or None where the object ends before.
Fetch = Callable[[int, int, str | None], Body | None]


class ShortBody(OSError):
    """A response ended before its last byte, as if it were whole."""


class RangeStream(io.RawIOBase):
    """Bytes `start`..`stop` of an object, read forward; all of one version, or UserError from `judge`.

    Failures are counted anew in each range of 16 MiB.
    """

    def __init__(
        self, url: str, fetch: Fetch, judge: Judge, errors: tuple[type[Exception], ...], start: int, stop: int | None,
        version: str | None,
    ) -> None:  # fmt: skip
        self._url, self._fetch, self._judge = url, fetch, judge
        self._errors: tuple[type[Exception], ...] = (*errors, ShortBody)
        self._position, self._stop, self._version = start, stop, version
        self._body: Body | None = None
        self._range_end = start
        self._attempts = Attempts(url, judge)
        while self._body is None and not self._finished:
            try:
                self._request()
            except self._errors as error:
                self._attempts.failed(error)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while not self._finished:
            try:
                if self._body is None:
                    self._request()
                    continue
                data = self._body.stream.read(min(len(view), _PIECE, self._range_end - self._position))
                if not data:
                    raise ShortBody(f"the response ended at byte {self._position} of {self._range_end}")
            except self._errors as error:
                self._drop()
                self._attempts.failed(error)
                continue
            view[: len(data)] = data
            self._position += len(data)
            if self._position == self._range_end:
                self._drop()
                self._attempts = Attempts(self._url, self._judge)
            return len(data)
        return 0

    def close(self) -> None:
        self._drop()
        super().close()

    @property
    def _finished(self) -> bool:
        return self._stop is not None and self._position >= self._stop

    def _request(self) -> None:
        """Ask for the next range; learn the object's version and where it ends."""
        fresh = self._position >= self._range_end
        wanted = self._position + RANGE if fresh else self._range_end
        body = self._fetch(self._position, wanted if self._stop is None else min(wanted, self._stop), self._version)
        if body is None:
            self._stop = self._position
            return
        self._body, self._version = body, body.version
        self._stop = body.size if self._stop is None else min(self._stop, body.size)
        self._range_end = min(wanted, self._stop)

    def _drop(self) -> None:
        if self._body is not None:
            with contextlib.suppress(OSError):  # a socket that is broken already
                self._body.stream.close()
            self._body = None
