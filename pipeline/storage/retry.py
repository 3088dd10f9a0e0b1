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
    """A transient error: its name, after how many in a row to give up, and what is said then.

    `otherwise` is raised then instead of Away: the error is more likely a mistake of the user's.
    """

    reason: str
    tries: int
    failed: str = "did not answer"
    remedy: str = "check that the store is up and its address right (AWS_ENDPOINT_URL, the network)"
    otherwise: Exception | None = None


# Judges an error: returns Passing if it is transient, else raises what it means (UserError, FileNotFoundError).
Judge = Callable[[str, Exception], Passing]
# Asked before each try of a write whether it may still be made; what it raises ends the write.
Check = Callable[[], None]


class Attempts:
    """Failures in a row of one operation on a URL."""

    def __init__(self, url: str, judge: Judge, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self.url, self.judge, self.failures = url, judge, 0
        self.longest_wait_s = longest_wait_s

    def failed(self, error: Exception) -> None:
        """Wait before a retry. Raises after too many failures, as a rule Away, or where a retry cannot help."""
        passing = self.judge(self.url, error)
        self.failures += 1
        if self.failures > passing.tries:
            if passing.otherwise is not None:
                raise passing.otherwise from error
            detail = " ".join(str(error).split())[:200]
            raise Away(
                f"'{self.url}' {passing.failed} in {self.failures} tries, the last ended with {passing.reason} "
                f"({detail}): {passing.remedy}, then run the same command again; what is finished is kept"
            ) from error
        counts[passing.reason] += 1
        if self.failures == WARN_AT:
            warnings.warn(
                f"'{self.url}': {passing.reason}, {self.failures} times in a row; tried again up to "
                f"{passing.tries} times",
                stacklevel=2,
            )
        # Full jitter: workers that failed together do not retry together.
        time.sleep(random.uniform(0, min(self.longest_wait_s, first_wait_s() * 2 ** (self.failures - 1))))


def call(
    url: str, judge: Judge, errors: tuple[type[Exception], ...], function: Callable[[], R],
    check: Check | None = None, longest_wait_s: float = LONGEST_WAIT_S,
) -> R:  # fmt: skip
    """function(), retried while it raises one of `errors` that is transient; `check` is called before each try."""
    attempts = Attempts(url, judge, longest_wait_s)
    while True:
        if check is not None:
            check()
        try:
            return function()
        except errors as error:
            attempts.failed(error)
