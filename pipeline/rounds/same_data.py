"""Whether a run still has the data that it was made from, as its driver asks at every start.

Each document of a run carries the identity of its data (`Manifest.identity`). What is older, and does not, is taken to
be of the data that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import manifest as manifests
from pipeline.data import shards, sources
from pipeline.run.layout import DENSE, START, trail
from pipeline.run.records import DataFacts, DenseMetrics, Scan, TestMetrics
from pipeline.run.state import MARKER, Run
from pipeline.settings.config import Config
from pipeline.train import session

SHARDS = "shards"  # the stage, and the folder of what it built


def settle(config: Config, run: Run, made_from: Callable[[], str]) -> None:
    """Hold the run to the data that it was made from. Raises UserError where its shards are others now.

    A run that has trained and measured nothing yet takes the new ones. `made_from` gives the fingerprint of the stage
    `shards`, which older runs are judged by: they write down the identity of their data from now on.
    """
    root = session.data_root(config, run)
    if not storage.exists(storage.join(root, manifests.NAME)):
        return  # not built yet, or taken away since
    facts = run.load(DataFacts, "data.json") if run.has("data.json") else None
    found, marker = shards.load_manifest(root), run.marker(SHARDS)
    before = facts is not None and facts.data is None and marker is not None  # of a program that did not write it down
    other = facts is not None and facts.data not in (None, found.identity)
    if before and sources.of(config.data).in_place:
        other = marker is not None and marker.made_from != made_from()
    if not other:
        for what, data in documents(run):
            session.require_same_data(config, run, found, data, what)
        if before and facts is not None:
            run.commit(replace(facts, data=found.identity), "data.json")
    elif begun(run):
        session.load_data(config, run)  # says what was, where it was written down
        raise UserError(
            f"'{root}' holds other shards than the run in '{run.root}' was made from (its manifest has another "
            "made_from): put the old shards back, or use another name=... for a run on these"
        )
    else:
        run.check_fence()
        for name in ("data.json", f"{SHARDS}/{MARKER}"):
            storage.remove(run.path(name))


def begun(run: Run) -> bool:
    """Whether anything of the run rests on its data: a training's checkpoint, or a network that was taken over."""
    saved = storage.list_folders(run.path(DENSE, "steps"))
    return bool(saved) or run.has(DENSE, "metrics.json") or run.has(START, "start.json")


def documents(run: Run) -> Iterator[tuple[str, str | None]]:
    """What the run has made so far, in words, and the identity of the data that each part was made from."""
    for name, what in (("dense/metrics.json", "the dense network"), ("rounds/control.json", "the dense control")):
        if run.has(name):
            yield what, run.load(DenseMetrics, name).data
    if run.has("scan", "scan.json"):
        yield "the scan", run.load(Scan, "scan", "scan.json").data
    for metrics in trail(run):
        yield f"round {metrics.round}", metrics.data
    if run.has("final", "test.json"):
        yield "the test result", run.load(TestMetrics, "final", "test.json").data
