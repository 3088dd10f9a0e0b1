"""What a scan has measured so far. It is kept in the run's folder as it comes, so that a stopped scan can go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.base.record import Record
from pipeline.run import journal
from pipeline.run.journal import Journal
from pipeline.run.records import Figures, Finding, Joint, JointTrials, Level, ScanOrigin, Trials
from pipeline.run.state import Run, fingerprint

LEVELS, TOGETHER = "levels", "together"  # folders in a run's scan folder, with a folder for each origin
OLDER = ("trials.json", "together.json")  # what older runs have in their place

R = TypeVar("R", bound=Record)


class Known:
    """The levels known by tensor, and the dense network's figures once they are. Each is written as it comes.

    Writing one costs the same however many there are.
    """

    def __init__(self, lines: Journal) -> None:
        self._lines = lines
        self._levels: dict[str, dict[float, Level]] = {}
        self.dense: Figures | None = None
        self.count = 0  # levels of all tensors

    def of(self, tensor: str) -> list[Level]:
        """A tensor's levels, in the order in which they were measured."""
        return [*self._levels.get(tensor, {}).values()]

    def add(self, tensor: str, level: Level) -> bool:
        """Add a level and write it; False, and nothing is written, where the tensor has one of the same density."""
        if not self.take(tensor, level):
            return False
        self._lines.add(Finding(tensor=tensor, level=level))
        return True

    def take(self, tensor: str, level: Level) -> bool:
        """Add a level that is written already; False where the tensor has one of the same density."""
        levels = self._levels.setdefault(tensor, {})
        if level.density in levels:
            return False
        levels[level.density] = level
        self.count += 1
        return True

    def set_dense(self, dense: Figures) -> None:
        """Write the dense network's figures, where they are new."""
        if dense != self.dense:
            self.dense = dense
            self._lines.add(Finding(dense=dense))


@contextmanager
def known(here: Run, made_of: ScanOrigin, older: str) -> Iterator[Known]:
    """What earlier scans of the same origin measured; while the block lasts more can be added.

    `older` is the document of an older run that may hold levels too.
    """
    folder = ("scan", LEVELS, fingerprint(made_of.to_json()))
    with Journal(here, *folder) as lines:
        found = Known(lines)
        before = _older(here, Trials, older)
        if before is not None and before.made_of == made_of:
            found.dense = before.dense
            for name, levels in before.levels.items():
                for level in levels:
                    found.take(name, level)
        for line in journal.read(here, Finding, *folder):
            if line.tensor is not None and line.level is not None:
                found.take(line.tensor, line.level)
            found.dense = line.dense or found.dense
        yield found


class KnownTogether:
    """What was measured with all tensors pruned together, by what they keep."""

    def __init__(self, lines: Journal) -> None:
        self._lines = lines
        self.rows: dict[str, Joint] = {}

    def add(self, row: Joint) -> None:
        """Add a row and write it."""
        self.rows[fingerprint(row.keep)] = row
        self._lines.add(row)


@contextmanager
def known_together(here: Run, made_of: ScanOrigin) -> Iterator[KnownTogether]:
    """What earlier scans of the same origin measured together; while the block lasts more can be added."""
    folder = ("scan", TOGETHER, fingerprint(made_of.to_json()))
    with Journal(here, *folder) as lines:
        found = KnownTogether(lines)
        before = _older(here, JointTrials, "together.json")
        rows = [*before.rows] if before is not None and before.made_of == made_of else []
        for row in [*rows, *journal.read(here, Joint, *folder)]:
            found.rows[fingerprint(row.keep)] = row
        yield found


def copy(source: Run, here: Run) -> None:
    """Copy what another run has measured so far; a scan of the same origin uses it."""
    for name in OLDER:
        if source.has("scan", name) and not here.has("scan", name):
            here.commit(source.read("scan", name), "scan", name)
    for folder in (LEVELS, TOGETHER):
        journal.copy(source, here, "scan", folder)


def _older(here: Run, kind: type[R], name: str) -> R | None:
    return here.load(kind, "scan", name) if here.has("scan", name) else None
