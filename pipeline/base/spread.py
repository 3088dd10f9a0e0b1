"""Work on many items by processes of this machine: results in order, a failure in one sentence."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeVar

from pipeline.base.errors import Away, Lost, UserError

T = TypeVar("T")
R = TypeVar("R")
WORTH_IT_S = 10.0  # seconds of work that is left; starting processes takes some


class Spread(Protocol):
    """Applies a function to items and gives the results in their order, computed wherever it likes."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], count: int) -> Generator[R]:
        """`function` is one of a module, and items and results can be pickled; there are `count` items.

        Whoever does not take all of the results closes the generator, which ends what is under way.
        """


class Refused(NamedTuple):
    """A UserError of another process, as text: errors of several arguments cannot be pickled. `away` if it may pass."""

    message: str
    away: bool


def caught(function: Callable[[T], R], item: T) -> R | Refused:
    """function(item), or the text of the UserError that it raised."""
    try:
        return function(item)
    except UserError as error:
        return Refused(str(error), isinstance(error, Away))


def told(result: R | Refused) -> R:
    """The result, or the UserError that came instead."""
    if isinstance(result, Refused):
        raise (Away if result.away else UserError)(result.message)
    return result


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def here(function: Callable[[T], R], items: Iterable[T], count: int) -> Generator[R]:
    """In this process, one after the other."""
    yield from map(function, items)


def processes(workers: int | None, worth_it_s: float = WORTH_IT_S) -> Spread:
    """So many processes (None: one for each core), once it is clear that the work takes long enough.

    Raises UserError as the function does, and Lost where a process is lost.
    """
    number = workers or cores()

    def spread(function: Callable[[T], R], items: Iterable[T], count: int) -> Generator[R]:
        source = iter(items)
        for done in itertools.count():
            began = time.monotonic()
            first = list(itertools.islice(source, 1))
            if not first:
                return
            yield function(first[0])
            took = time.monotonic() - began
            if number > 1 and took * (count - done - 1) > worth_it_s:
                break
        with _Pool(function, number) as pool:
            yield from in_turn(lambda item: pool.submit(caught, function, item), source, 2 * number)

    return spread


def in_turn(submit: Callable[[T], Future[Any]], items: Iterator[T], ahead: int) -> Iterator[Any]:
    """The results of futures in the order of their items, of which at most `ahead` wait. Raises as `told` does."""
    waiting: deque[Future[Any]] = deque()
    try:
        while True:
            for item in itertools.islice(items, ahead - len(waiting)):
                waiting.append(submit(item))
            if not waiting:
                return
            yield told(waiting.popleft().result())
    except BrokenProcessPool as error:
        raise Lost(
            "a process of this machine's was lost, perhaps for lack of memory: what is finished is kept, and the same "
            "command goes on; it can be told to use fewer"
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def _end_with_parent() -> None:
    """In a process of the pool: end as soon as the one that it works for has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


_STARTING = threading.Lock()  # while __main__ is another


class _Process(ForkServerProcess):
    """One that does not run the program's script, which would start its work again where it has no __main__ guard."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Popen:
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")  # what the new process is told to run: nothing
            try:
                return ForkServerProcess._Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Context(ForkServerContext):
    """Makes such processes."""

    Process = _Process


class _Pool:
    """Processes that have imported the function's module; at the end of the block they are gone."""

    def __init__(self, function: Callable[..., Any], number: int) -> None:
        while isinstance(function, functools.partial):
            function = function.func
        context = _Context()
        context.set_forkserver_preload([function.__module__])
        self._pool = ProcessPoolExecutor(number, context, _end_with_parent)

    def __enter__(self) -> ProcessPoolExecutor:
        return self._pool

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # what is under way is not waited for
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
