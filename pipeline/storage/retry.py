"""Retries after transient errors: for which errors, how many, and how long to wait."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from pipeline.base.environment import number
from pipeline.base.errors import Away

R = TypeVar("R")
LONGEST_WAIT_S = 16.0
WARN_AT = 3  # failures in a row before the user is told
# Failures that were tried again, by name, in this process.
counts: Counter[str] = Counter()


def tries() -> int:
    """Failures in a row that one operation survives: with the waits below about a minute."""
    return int(number("SECATEUR_STORAGE_RETRIES", 12))


def timeout_s() -> float:
    """Seconds of silence after which a socket counts as stalled."""
    return number("SECATEUR_STORAGE_TIMEOUT_S", 15)


def first_wait_s() -> float:
    """The longest wait after the first failure; it doubles up to LONGEST_WAIT_S."""
    return number("SECATEUR_STORAGE_BACKOFF_S", 0.5)


class Passing(NamedTuple):
    """A transient error: its name, and after how many in a row to give up."""

    reason: str
    tries: int


# Judges an error: returns Passing if it is transient, else raises what it means (UserError, FileNotFoundError).
Judge = Callable[[str, Exception], Passing]


class Attempts:
    """Failures in a row of one operation on a URL."""

    def __init__(self, url: str, judge: Judge) -> None:
        self.url, self.judge, self.failures = url, judge, 0

    def failed(self, error: Exception) -> None:
        """Wait before a retry. Raises Away after too many failures, or where a retry cannot help."""
        passing = self.judge(self.url, error)
        self.failures += 1
        if self.failures > passing.tries:
            detail = " ".join(str(error).split())[:200]
            raise Away(
                f"'{self.url}' did not answer in {self.failures} tries, the last ended with {passing.reason} "
                f"({detail}): check that the store is up and its address right (AWS_ENDPOINT_URL, the network), then "
                "run the same command again; what is finished is kept"
            ) from error
        counts[passing.reason] += 1
        if self.failures == WARN_AT:
            warnings.warn(
                f"'{self.url}': {passing.reason}, {self.failures} times in a row; tried again up to "
                f"{passing.tries} times",
                stacklevel=2,
            )
        # Full jitter: workers that failed together do not retry together.
        time.sleep(random.uniform(0, min(LONGEST_WAIT_S, first_wait_s() * 2 ** (self.failures - 1))))


def call(url: str, judge: Judge, errors: tuple[type[Exception], ...], function: Callable[[], R]) -> R:
    """function(), retried while it raises one of `errors` that is transient."""
    attempts = Attempts(url, judge)
    while True:
        try:
            return function()
        except errors as error:
            attempts.failed(error)
