"""A run that was made before its documents were records is read, reported, synced, measured, and goes on.

tests/data/run-before-records is such a run: tiny_run's config with seed 0, without its shards, which are built anew,
and with its larger weights gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from tiny_run import ALONE
from tracking_server import everything, named

from pipeline import stages
from pipeline.base.record import Record, plain
from pipeline.cli import commands
from pipeline.export import bench
from pipeline.local import LocalEngine
from pipeline.results import report
from pipeline.run import records
from pipeline.run.contents import read
from pipeline.run.events import Event, RoundBegun, StageBegun, unheard
from pipeline.run.result import Result
from pipeline.run.state import config_of, open_run
from pipeline.stages import Driver
from pipeline.train.world import configure_process

OLD = ROOT / "tests/data/run-before-records"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the run."""
    run = tmp_path / "runs/tiny"
    shutil.copytree(OLD, run)
    for file in run.rglob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    return run


def document(*parts: str) -> Any:
    return json.loads(OLD.joinpath(*parts).read_text())


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def carry_out(run: Path, *wanted: stages.Stage) -> None:
    """Some stages of the run, by its own config."""
    config = config_of(run)
    configure_process(config.threads)
    with open_run(config) as here:
        stages.carry_out(wanted, Driver(config, LocalEngine(ALONE), here, unheard))


def test_every_document_is_a_record_to_the_bit(old: Path) -> None:
    found = read(old)
    assert plain(found.run) == document("run.json")
    assert plain(found.data) == document("data.json")
    assert plain(found.dense) == document("dense/metrics.json")
    assert plain(found.control) == document("rounds/control.json")
    assert plain(found.histograms) == document("final/histograms.json")
    assert plain(found.activity) == document("final/activity.json")
    newer = {"against_dense": None, "largest_class": None}  # not measured then
    known = document("result.json")
    later = {"packed_index_bits_per_kept": None, "packed_bound_bits_per_kept": None}
    known["layers"] = [{**layer, **later} for layer in known["layers"]]
    known["bytes"]["packed_bound"] = None
    assert plain(found.result) == {**known, "flops_density_weights": None, "test": {**known["test"], **newer}}
    for each in found.rounds:
        assert plain(each.plan) == {**document(each.folder, "plan.json"), "groups": []}  # of channels: later
        assert plain(each.metrics) == document(each.folder, "metrics.json")
    assert len(found.rounds) == 2
    others: dict[str, type[Record]] = {
        "scan/scan.json": records.Scan,
        "scan/trials.json": records.Trials,
        "final/test.json": records.TestMetrics,
        "final/finished.json": records.StageMarker,
    }
    for name, kind in others.items():
        assert kind.from_json(document(name), name).to_json() == document(name)


def test_older_metrics_and_plans_lack_what_came_later(old: Path) -> None:
    for name, later in (
        ("metrics.json", ("attempt", "accepted", "dead", "dropout", "reconstruction", "finished_ms")),
        ("plan.json", ("attempt", "predicted", "groups")),
    ):
        file = old / "rounds/01" / name
        kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in later}
        for tensor in kept.get("tensors", ()):
            del tensor["dead"]
        file.write_text(json.dumps(kept))
    first = read(old).rounds[0]
    assert first.plan is not None
    assert first.metrics is not None
    assert (first.attempt, first.metrics.accepted, first.metrics.dead) == (1, True, 0)
    assert (first.plan.predicted, first.plan.dead) == (None, 0)
    assert "Percent of weights kept in each layer" in report.render(old)


def test_its_report_is_rendered(old: Path) -> None:
    text = report.render(old)
    assert "Accuracy was lost" in text
    assert "8,366 of 50,200 weights kept" in text
    assert text.count("<svg ") == 2 * 5 + 3  # figures for wide pages and narrow ones, and histograms


def test_it_is_synced_to_mlflow(old: Path) -> None:
    synced = commands.sync(old)
    assert Result.from_json(json.loads((old / "result.json").read_text()), "result.json").mlflow == synced.place
    parts = named(everything(config_of(old)))
    assert sorted(parts) == ["round 1", "round 2", "tiny"]
    assert parts["tiny"]["points"]["final/compression"][0][2] == document("result.json")["compression"]
    assert parts["round 2"]["points"]["round/val_accuracy"][0][2] == document("rounds/02/metrics.json")["val"]["top1"]


def test_it_is_measured(old: Path) -> None:
    carry_out(old, stages.SHARDS)
    found = bench.bench_run(old, repeats=5)
    assert max(found.differences.values()) < 1e-4
    assert {row.name for row in found.rows} == {"dense", "pruned", "compact", "CSR"}


def test_it_goes_on_from_its_first_round_to_the_same_bits(old: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh/tiny"
    fresh.mkdir(parents=True)
    shutil.copy(old / "config.yaml", fresh)
    carry_out(fresh, stages.SHARDS, stages.DENSE)
    weights, final = "dense/checkpoint/weights.safetensors", "final/model.safetensors"
    if digest(fresh / weights) != digest(old / weights):
        pytest.skip("this machine's sums have other last digits than those of the machine that made the run")
    expected = digest(old / final)
    for part in ("rounds/02", "final"):
        shutil.rmtree(old / part)
    for name in ("rounds/control.json", "rounds/finished.json", "result.json"):
        (old / name).unlink()
    events: list[Event] = []
    config = config_of(old)
    configure_process(config.threads)
    result = stages.run(config, LocalEngine(ALONE), events.append)
    assert [event.stage for event in events if isinstance(event, StageBegun) and event.skipped] == ["dense", "scan"]
    assert [event.phase for event in events if isinstance(event, RoundBegun)] == ["rounds/02"]
    assert digest(old / final) == expected
    before = Result.from_json(document("result.json"), "result.json")
    as_then = result.test.model_copy(update={"against_dense": None, "largest_class": None})
    layers = tuple(layer.model_copy(update={"packed_index_bits_per_kept": None}) for layer in result.layers)
    assert (result.val, as_then, layers) == (before.val, before.test, before.layers)
    assert (result.weights_kept, result.verdict) == (before.weights_kept, before.verdict)
