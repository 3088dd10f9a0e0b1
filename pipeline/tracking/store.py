"""Makes one MLflow run hold what its record says: params, points, files, tags, data and status.

Each part asks first what is there already, so an interrupted call is made whole by the next. mlflow is imported inside
functions, since the import takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.base.errors import UserError
from pipeline.run.events import Busy
from pipeline.run.records import StartFacts
from pipeline.tracking import curves
from pipeline.tracking.curves import Point
from pipeline.tracking.records import ATTEMPT, KIND, PARENT, ROUND, UID, Artifact, DataSet, MlflowRun

# MLflow's page does not show tags that begin with mlflow. Some stores take no more than 5000 characters in one.
_LEDGER, _LEDGER_PART = "mlflow.secateur.artifacts", 4000
_LARGE = 2**20  # bytes
_POINTS = "mlflow.secateur.points"  # digest of the points that are all there
_LINES = "mlflow.secateur.machines"  # how many lines of machines are all there
_NOTE = "mlflow.note.content"
_CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}
_BATCH, _POINTS_BATCH = 100, 1000  # params, and points, in one request: as many as MLflow takes
_REMEMBERED = 32  # MLflow runs of which this process remembers the points


@dataclass(frozen=True)
class _Held:
    """The points that an MLflow run holds, and the digest that this process left in its tag with them."""

    digest: str
    points: frozenset[Point]


_held: dict[tuple[str, str], _Held] = {}  # by the store and the id of the MLflow run


def known(client: Any, experiment: str, uid: str) -> list[Any]:
    """This run's MLflow runs, parent and rounds. Runs that already hold something come first."""
    if not re.fullmatch(r"[0-9A-Za-z_-]+", uid):
        raise UserError(f"run.json: uid={uid!r} is not made of letters and digits; restore the file from a copy")
    found = client.search_runs([experiment], filter_string=f"tags.`{UID}` = '{uid}'", max_results=1000)
    return sorted(found, key=lambda run: (_LEDGER not in run.data.tags, run.info.run_id))


def parent_run(client: Any, experiment: str, start: StartFacts | None) -> dict[str, str]:
    """The tag with the parent run's MLflow id, for a parent that came into MLflow only after the branch had begun."""
    if start is None or start.mlflow_run_id:
        return {}
    found = [run for run in known(client, experiment, start.uid) if run.data.tags.get(KIND) == "run"]
    return {PARENT: str(found[0].info.run_id)} if found else {}


def put(client: Any, experiment: str, record: MlflowRun, known: Sequence[Any], tags: dict[str, str]) -> str:
    """Make one MLflow run hold what its record says. Returns its id."""
    same = [run for run in known if record.identity.items() <= run.data.tags.items()]
    if same:
        run = same[0]
    else:
        run = client.create_run(experiment, record.start_ms, {**record.identity, **record.tags, **tags}, record.name)
    _set_params(client, run, record)
    _add_points(client, run, record.points, new=not same)
    _add_lines(client, run, record.machines, record.start_ms)
    _upload(client, run, record.artifacts)
    tables = {"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in record.tables])}
    note = {_NOTE: record.note.replace("{run_id}", run.info.run_id)} if record.note else {}
    _set_tags(client, run, {**record.tags, **tags, **note, **(tables if record.tables else {})})
    if run.info.run_name != record.name:
        client.update_run(run.info.run_id, name=record.name)
    _add_data(client, run, record.data)
    if record.identity[KIND] != "run":
        set_status(client, run, record)
    return str(run.info.run_id)


def delete_twins(client: Any, known: Sequence[Any]) -> None:
    """Keep the first MLflow run of each part. The others come from a request that was repeated after its answer was
    lost.
    """
    kept = set()
    for run in known:
        identity = tuple(run.data.tags.get(tag) for tag in (KIND, ROUND, ATTEMPT))
        if identity in kept:
            client.delete_run(run.info.run_id)  # it can be restored in MLflow
        kept.add(identity)


def _set_params(client: Any, run: Any, record: MlflowRun) -> None:
    """MLflow's params cannot be changed: a setting changed since (as the number of workers may) is told in a tag."""
    from mlflow.entities import Param

    there = run.data.params
    missing = [Param(key, value) for key, value in record.params.items() if key not in there]
    for start in range(0, len(missing), _BATCH):
        client.log_batch(run.info.run_id, params=missing[start : start + _BATCH])
    changed = [f"{k}: {there[k]} -> {v}" for k, v in record.params.items() if k in there and there[k] != v]
    if changed or "secateur.changed_settings" in run.data.tags:
        _set_tags(client, run, {"secateur.changed_settings": "\n".join(changed)[:_LEDGER_PART]})


def _add_points(client: Any, run: Any, points: Sequence[Point], new: bool) -> None:
    """Log the points that MLflow lacks. sqlite ignores a second identical point; other stores may keep both.

    MLflow is asked which it has where this process does not know: it has logged none yet, its last request failed, or
    another process has logged some since.
    """
    digest, before = hashlib.sha256(repr(points).encode()).hexdigest()[:16], run.data.tags.get(_POINTS)
    if before == digest:
        return
    place = client.tracking_uri, run.info.run_id
    held = _held.pop(place, None)  # what is known holds again only when all of the requests below have been answered
    there: Set[Point] = held.points if held is not None and held.digest == before else set()
    unsure = () if new or there else points
    _log_missing(client, run, [point for point in points if point not in there], unsure)
    _set_tags(client, run, {_POINTS: digest})  # after the points, so that an interrupted sync looks again
    _held[place] = _Held(digest, frozenset(points))
    if len(_held) > _REMEMBERED:
        del _held[next(iter(_held))]


def _add_lines(client: Any, run: Any, lines: Sequence[Busy], created_ms: int) -> None:
    """Log the lines of machines that came since the last time. Those before are not asked for: there may be very many.

    The tag is "DONE", or "DONE+SENT" while lines are sent: an interrupted sync looks which of these are there.
    """
    done, _, sent = run.data.tags.get(_LINES, "0").partition("+")
    if int(done) >= len(lines):
        return
    unsure = curves.of_machines(lines[int(done) : int(sent or done)], created_ms)
    _set_tags(client, run, {_LINES: f"{done}+{len(lines)}"})
    _log_missing(client, run, curves.of_machines(lines[int(done) :], created_ms), unsure)
    _set_tags(client, run, {_LINES: str(len(lines))})


def _log_missing(client: Any, run: Any, points: Sequence[Point], unsure: Sequence[Point]) -> None:
    """Log the points, but for those among `unsure` that are there."""
    from mlflow.entities import Metric

    there: set[Point] = set()
    for key in sorted({point.key for point in unsure}):
        if key in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, key)
            there |= {Point(m.key, m.value, m.step, m.timestamp) for m in history}
    missing = [Metric(p.key, p.value, p.when, p.step) for p in dict.fromkeys(points) if p not in there]
    for start in range(0, len(missing), _POINTS_BATCH):
        client.log_batch(run.info.run_id, metrics=missing[start : start + _POINTS_BATCH])


def _add_data(client: Any, run: Any, data: Sequence[DataSet]) -> None:
    """Name the data as inputs of the run, once; a run whose data have changed is refused elsewhere."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    there = {each.dataset.name for each in run.inputs.dataset_inputs} if run.inputs else set()
    missing = [each for each in data if each.name not in there]
    if missing:
        client.log_inputs(
            run.info.run_id,
            [
                DatasetInput(
                    Dataset(
                        each.name, each.digest, *_source(each.source), profile=json.dumps({"samples": each.samples})
                    ),
                    [InputTag("mlflow.data.context", _CONTEXTS[each.split])],
                )
                for each in missing
            ],
        )


def _source(root: str | None) -> tuple[str, str]:
    """A data set's kind of source and the source, as MLflow's own sources write them."""
    if root is None:
        return "code", json.dumps({"tags": {"mlflow.source.name": "scikit-learn"}})
    kind = root.partition("://")[0] if "://" in root else "local"
    return ("http" if kind == "https" else kind), json.dumps({"url" if kind.startswith("http") else "uri": root})


def _upload(client: Any, run: Any, artifacts: Sequence[Artifact]) -> None:
    """Upload the files that are not in the ledger, or are no longer in the store.

    The ledger is {path: [digest, bytes]}, in tags of the MLflow run itself, so that it is right on any machine. It is
    written after each large file and at the end: an interrupted sync repeats little, and repeating replaces.
    """
    ledger: dict[str, list[Any]] = _read_ledger(run.data.tags)
    run_id = run.info.run_id
    there = _listing(client, run, {str(PurePosixPath(path).parent) for path in ledger})
    with tempfile.TemporaryDirectory(prefix="secateur-mlflow-") as scratch:
        for artifact in artifacts:
            digest, size = ledger.get(artifact.path, ("", -1))
            if digest == artifact.digest[:16] and there.get(artifact.path) == size:
                continue
            file = artifact.open(Path(scratch))
            folder = str(PurePosixPath(artifact.path).parent)
            client.log_artifact(run_id, str(file), None if folder == "." else folder)
            ledger[artifact.path] = [artifact.digest[:16], file.stat().st_size]
            if file.stat().st_size > _LARGE:
                _set_tags(client, run, _write_ledger(ledger))
    _set_tags(client, run, _write_ledger(ledger))


def _listing(client: Any, run: Any, folders: set[str]) -> dict[str, int]:
    """The size in bytes of each artifact that the store has in these folders.

    By the store itself: MLflow's client would also look for models of the run, which an old server does not know.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    found, store = {}, get_artifact_repository(run.info.artifact_uri, tracking_uri=client.tracking_uri)
    for folder in sorted(folders):
        for info in store.list_artifacts(None if folder == "." else folder):
            if not info.is_dir:
                found[info.path] = int(info.file_size)
    return found


def _read_ledger(tags: dict[str, str]) -> dict[str, list[Any]]:
    """The ledger. It is empty, so that all files are uploaded again, if its parts do not fit together after a crash."""
    parts = [tags.get(_LEDGER, "")]
    while (following := tags.get(f"{_LEDGER}.{len(parts) + 1}")) is not None:
        parts.append(following)
    try:
        ledger = json.loads("".join(parts))
    except ValueError:
        return {}
    return ledger if isinstance(ledger, dict) else {}


def _write_ledger(ledger: dict[str, list[Any]]) -> dict[str, str]:
    text = json.dumps(ledger, sort_keys=True, separators=(",", ":"))
    parts = [text[i : i + _LEDGER_PART] for i in range(0, len(text), _LEDGER_PART)]
    return {_LEDGER if i == 0 else f"{_LEDGER}.{i + 1}": part for i, part in enumerate(parts)}


def _set_tags(client: Any, run: Any, tags: dict[str, str]) -> None:
    """Set the tags that differ from what is there."""
    from mlflow.entities import RunTag

    changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    if changed:
        client.log_batch(run.info.run_id, tags=changed)
        run.data.tags.update(tags)


def set_status(client: Any, run: Any, record: MlflowRun) -> None:
    """RUNNING; or how the run ended, and when."""
    if record.end_ms is None:
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
    elif (run.info.status, run.info.end_time) != (record.status, record.end_ms):
        client.set_terminated(run.info.run_id, status=record.status, end_time=record.end_ms)
