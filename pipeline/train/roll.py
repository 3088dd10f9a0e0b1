"""Who is where: ranks that wait for one that does not come find out which one it is.

Each rank notes in its own memory where it is, which costs no communication. A thread puts the note into the store of
the process group every few seconds, and reads those of the others. A rank that waits for the others longer than
cluster.hang_seconds looks for the one that is behind. A rank that is slow, but goes on, is never taken for one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from torch.distributed import Store

LOOK_EVERY_S = 5.0  # the most seconds between two looks at the others


@dataclass(frozen=True)
class Note:
    """Where a rank is, since `since` (seconds since 1970 on its own clock).

    `waits` is true where it waits for the others, for the `number`-th time. One that is `done` has left the work.
    """

    number: int = 0
    place: str = "its start"
    waits: bool = False
    done: bool = False
    since: float = 0.0
    pid: int = 0
    host: str = "an unknown host"


@dataclass(frozen=True)
class Seen:
    """What a rank knows of another one, or of itself.

    `still`: seconds since its note changed. `silent`: seconds since its process gave the last sign of life.
    """

    note: Note
    still: float
    silent: float


def missing(ranks: Mapping[int, Seen], seconds: float) -> list[int] | None:
    """The ranks that the others wait for in vain, for more than `seconds`; None while there are no such ones.

    An empty list says that all wait for each other at the same place.
    """
    here = {rank: seen for rank, seen in ranks.items() if not seen.note.done}
    stuck = {rank: seen for rank, seen in here.items() if seen.still > seconds}
    if not any(seen.note.waits and seen.silent <= seconds for seen in stuck.values()):
        return None  # nobody waits so long
    gone = [rank for rank, seen in here.items() if seen.silent > seconds]
    if gone:
        return gone
    busy = [rank for rank, seen in here.items() if not seen.note.waits]
    if busy:
        return None if any(rank not in stuck for rank in busy) else busy
    if len(stuck) < len(here):
        return None  # one of them has only just come
    first = min(seen.note.number for seen in here.values())
    behind = [rank for rank, seen in here.items() if seen.note.number == first]
    return [] if len(behind) == len(here) else behind


def said(ranks: Mapping[int, Seen], behind: list[int], seconds: float) -> str:
    """What a person is told: which rank, where, since when, and what to do."""
    if not behind:
        place = next(iter(ranks.values())).note.place
        return (
            f"all ranks have waited for each other for {seconds:g} s at {place}: messages between their hosts are "
            f"lost; look at the network ({_remedy(seconds)})"
        )
    parts = []
    for rank in behind:
        seen, note = ranks[rank], ranks[rank].note
        since = time.strftime("%H:%M:%S UTC", time.gmtime(note.since)) if note.since else "its start"
        life = "its process gives no sign of life" if seen.silent > seconds else "its process lives, but does not go on"
        parts.append(f"rank {rank} on {note.host} (process {note.pid}) has been at {note.place} since {since}, {life}")
    return f"{'; '.join(parts)}; the other ranks wait for it: look at that host ({_remedy(seconds)})"


def _remedy(seconds: float) -> str:
    return f"raise cluster.hang_seconds={seconds:g} if such a wait is right"


class Roll:
    """The notes of all ranks, as this rank knows them. `found` is called, in a thread, with what `said` gives.

    Of the ranks that wait, the lowest calls it first, the others a little later.
    """

    def __init__(self, store: Store, rank: int, size: int, seconds: float, found: Callable[[str], None]) -> None:
        self.store, self.rank, self.seconds, self.found = store, rank, seconds, found
        self.every = min(LOOK_EVERY_S, seconds / 4)
        self.note = Note(since=time.time(), pid=os.getpid(), host=socket.gethostname())
        now = time.monotonic()
        self._notes: dict[int, Note] = {other: Note() for other in range(size)}
        self._moved = dict.fromkeys(range(size), now)
        self._heard = dict.fromkeys(range(size), now)
        self._signs: dict[int, int] = {}
        self._answered = now  # when the store last did
        self._over = threading.Event()
        self._talking = threading.Thread(target=self._talk, daemon=True)

    def at(self, place: str, waits: bool = False) -> None:
        """Note that this rank has come to a place; all ranks wait for each other equally often."""
        self.note = Note(self.note.number + waits, place, waits, False, time.time(), self.note.pid, self.note.host)

    def start(self) -> None:
        """Begin to tell and to look."""
        self._talking.start()
        threading.Thread(target=self._judge, daemon=True).start()

    def stop(self) -> None:
        """Leave the work: the others no longer wait for this rank."""
        self.note = replace(self.note, done=True)
        self._over.set()
        self._talking.join(timeout=2)

    def seen(self) -> dict[int, Seen]:
        """What is known of every rank at this moment."""
        now = time.monotonic()
        return {
            rank: Seen(note, now - self._moved[rank], now - self._heard[rank]) for rank, note in self._notes.items()
        }

    def _talk(self) -> None:
        """Tell and read notes. Where the store does not answer this thread may wait forever; `_judge` sees that."""
        sign, last = 0, False
        while True:
            sign += 1
            try:
                self.store.set(f"{self.rank}", json.dumps([sign, asdict(self.note)]))
                for rank in () if last else self._notes:
                    if self.store.check([f"{rank}"]):
                        self._hear(rank, json.loads(self.store.get(f"{rank}")))
                self._answered = time.monotonic()
            except RuntimeError:  # torch's: the store is gone with its process, and the work ends
                return
            if last:
                return
            last = self._over.wait(self.every)

    def _hear(self, rank: int, told: Any) -> None:
        sign, note = told[0], Note(**told[1])
        now = time.monotonic()
        if sign != self._signs.get(rank):
            self._signs[rank], self._heard[rank] = sign, now
        if note != self._notes[rank]:
            self._notes[rank], self._moved[rank] = note, now

    def _judge(self) -> None:
        waited = 0
        while not self._over.wait(self.every):
            ranks = self.seen()
            quiet = time.monotonic() - self._answered
            if quiet > self.seconds:  # rank 0 has the store, or the network to it is gone
                mine = Seen(self.note, self.seconds + 1, 0.0) if self.note.waits else ranks[self.rank]
                ranks = {0: Seen(ranks[0].note, quiet, quiet), self.rank: mine}
            behind = missing(ranks, self.seconds)
            if behind is None:
                waited = 0
                continue
            speaker = min((rank for rank in ranks if rank not in behind), default=self.rank)
            if self.rank == speaker or waited > 2:
                self.found(said(ranks, behind, self.seconds))
                return
            waited += 1


@contextmanager
def called(
    store: Store | None, rank: int, size: int, seconds: float, found: Callable[[str], None]
) -> Iterator[Roll | None]:
    """While the block lasts, ranks that share `store` look for one that hangs; nobody does where there is no store."""
    if store is None:
        yield None
        return
    own = store.clone()  # a connection of its own: the process group may be waiting on the other one
    own.set_timeout(timedelta(seconds=max(1.0, seconds)))
    roll = Roll(own, rank, size, seconds, found)
    roll.start()
    try:
        yield roll
    finally:
        roll.stop()
