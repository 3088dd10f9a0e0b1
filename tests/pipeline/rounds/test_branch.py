"""Branches, on small folders written through the records: which source will do, and what a branch knows of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import few_samples
import pytest
import run_files
import torch
from torch import nn

from pipeline.base.errors import UserError
from pipeline.network.survey import Prunable, survey
from pipeline.rounds import branch
from pipeline.rounds.campaign import Origin
from pipeline.run import journal, state
from pipeline.run.records import Ancestor, Figures, Finding, LayerCount, StartFacts
from pipeline.run.state import Run
from pipeline.settings.config import Config
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint

NAMES = ("0.weight", "1.weight")


def network() -> list[Prunable]:
    """The tensors of a network of 4 + 4 weights."""
    return survey(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))[0]


def config_of(folder: Path, name: str, **changes: Any) -> Config:
    base = few_samples.config_on(folder, 1, **{"prune.schedule": "list", "prune.list": [0.5, 0.25], **changes})
    return base.model_copy(update={"name": name})


def source_in(folder: Path, rounds: int = 2, **changes: Any) -> Run:
    """A run `source` whose dense network and so many rounds are finished; each round keeps half."""
    run = few_samples.run_in(folder / "runs/source")
    config = config_of(folder, "source", **changes)
    run_files.begin(config, uid="feed")
    run.finish("dense", "made", 1.0)
    for number in range(1, rounds + 1):
        put(run, number)
    return run


def put(run: Run, number: int, good: bool = True, attempt: int = 1, folder: str | None = None) -> None:
    kept = 8 >> number
    layers = tuple(LayerCount(name, 4, kept // 2, kept / 8) for name in NAMES)
    metrics = run_files.round_metrics(number, kept / 8, attempt, good)
    metrics = replace(metrics, kept=kept, weights=8, density=kept / 8, layers=layers)
    run.commit(metrics, folder or f"rounds/{number:02d}", "metrics.json")


def found(folder: Path, start: str, **changes: Any) -> branch.Source:
    return branch.find(config_of(folder, "branch", **{"start.from": start, **changes}), network())


def facts(**values: Any) -> StartFacts:
    made: dict[str, Any] = {
        "run": "first", "path": "runs/first", "uid": "beef", "round": 1, "generation": 1, "weights": 8, "kept": 6,
        "density": 0.75, "compression": 8 / 6, "mlflow_run_id": None, "ancestors": (), "retrain": ({"epochs": 7},),
    }  # fmt: skip
    return StartFacts(**{**made, **values})


def test_a_source_lies_under_runs_dir_or_where_its_path_says(tmp_path: Path) -> None:
    def root(start: str) -> str:
        config = config_of(tmp_path, "branch", **{"start.from": start})
        return state.source_root(config.start, config.runs_dir)

    assert root("source:2") == f"{tmp_path}/runs/source"
    assert root("/elsewhere/source:2") == "/elsewhere/source"
    assert root("s3://bucket/runs/source:2") == "s3://bucket/runs/source"


def test_where_a_branch_of_a_round_begins(tmp_path: Path) -> None:
    source_in(tmp_path, **{"retrain.epochs": 3})
    source = found(tmp_path, "source:2")
    assert source.checkpoint == "rounds/02/checkpoint"
    assert source.origin == Origin(2, 8, 2)
    told = source.facts
    assert (told.run, told.path, told.uid, told.round, told.generation) == (
        "source", f"{tmp_path}/runs/source", "feed", 2, 2,
    )  # fmt: skip
    assert (told.weights, told.kept, told.density, told.compression) == (8, 2, 0.25, 4.0)
    assert (told.ancestors, told.mlflow_run_id) == ((), None)
    assert [recipe["epochs"] for recipe in told.retrain] == [3, 3]  # one for each round, as the source retrained


def test_round_0_is_the_dense_network(tmp_path: Path) -> None:
    source_in(tmp_path)
    source = found(tmp_path, "source:0")
    assert source.checkpoint == "dense/checkpoint"
    assert source.origin == Origin(8, 8, 0)
    assert source.facts.retrain == ()


def test_a_branch_of_a_branch_has_all_its_ancestors(tmp_path: Path) -> None:
    """The source began after 1 round of `first`, whose recipe had 7 epochs, at 6 of 8 weights."""
    run = source_in(tmp_path, rounds=1, **{"retrain.epochs": 3})
    begins = facts(ancestors=(Ancestor("zeroth", "dead", 0),))
    run.commit(begins, "start", "start.json")
    told = found(tmp_path, "source:1").facts
    assert told.generation == 2
    assert told.ancestors == (Ancestor("zeroth", "dead", 0), Ancestor("first", "beef", 1))
    assert [recipe["epochs"] for recipe in told.retrain] == [7, 3]
    run.commit({}, "start/checkpoint", "manifest.json")
    layers = tuple(LayerCount(name, 4, 3, 0.75) for name in NAMES)
    run.commit(replace(run_files.round_metrics(1, 0.75), kept=6, layers=layers), "start", "metrics.json")
    source = found(tmp_path, "source:0")  # what the source itself began with
    assert source.checkpoint == "start/checkpoint"
    assert source.origin == Origin(6, 8, 1)


def test_whether_a_run_is_a_branch(tmp_path: Path) -> None:
    run = few_samples.run_in(tmp_path)
    assert branch.begun(run) is None
    run.commit(facts(), "start", "start.json")
    assert branch.begun(run) == facts()


def test_the_recipes_of_a_lineage_are_those_before_and_then_its_own(tmp_path: Path) -> None:
    config, run = config_of(tmp_path, "branch", **{"retrain.epochs": 3}), few_samples.run_in(tmp_path)
    assert branch.retrainings(config.retrain, run) == []
    put(run, 1)
    put(run, 2, good=False)  # is undone, and so has no training in the control
    assert [each.epochs for each in branch.retrainings(config.retrain, run)] == [3]
    run.commit(facts(generation=2, retrain=({"epochs": 7}, {"epochs": 8})), "start", "start.json")
    assert [each.epochs for each in branch.retrainings(config.retrain, run)] == [7, 8, 3]


def test_a_branch_that_has_taken_what_it_needs_does_not_look_again(tmp_path: Path) -> None:
    config, here = config_of(tmp_path, "branch", **{"start.from": "source:1"}), few_samples.run_in(tmp_path / "here")
    with pytest.raises(UserError, match="is not a run"):
        branch.origin(config, here, network(), None)
    here.commit(facts(), "start", "start.json")
    assert branch.origin(config, here, network(), None) == Origin(6, 8, 1)
    own = few_samples.run_in(tmp_path / "own")
    assert branch.origin(config_of(tmp_path, "own"), own, network(), None) == Origin(8, 8)


def refusal(folder: Path, start: str, **changes: Any) -> str:
    with pytest.raises(UserError) as refused:
        found(folder, start, **changes)
    return str(refused.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "nowhere:1") == (
        f"start.from=nowhere:1: '{tmp_path}/runs/nowhere' is not a run; give a name under runs_dir, a path or a URL, "
        "and the round"
    )
    assert refusal(tmp_path, "branch:1") == "start.from=branch:1 is this run itself: give the branch another name=..."


def test_other_settings_than_the_sources_are_refused_with_both_values(tmp_path: Path) -> None:
    source_in(tmp_path)
    said = refusal(tmp_path, "source:1", **{"seed": 5, "dense.lr": 0.07})
    assert "these settings differ: dense.lr: 0.05 -> 0.07; seed: 0 -> 5; give them as they are in" in said
    assert said.endswith(f"{tmp_path}/runs/source/config.yaml")
    own = {"retrain.epochs": 9, "prune.list": [0.1], "scan.levels": [0.3], "data.cache_bytes": 0, "threads": 3}
    assert found(tmp_path, "source:1", **own).round == 1  # a branch's own


def test_a_dense_network_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    run = source_in(tmp_path, rounds=0)
    Path(run.path("dense/finished.json")).unlink()
    assert refusal(tmp_path, "source:0") == (
        f"start.from=source:0: the dense network of '{run.root}' is not finished; carry that run on first"
    )


def test_a_round_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    root = source_in(tmp_path).root
    assert refusal(tmp_path, "source:3") == (
        f"start.from=source:3: round 3 of '{root}' is not finished; rounds 0 (dense) to 2 can be started from"
    )
    root = source_in(tmp_path / "none", rounds=0).root
    assert refusal(tmp_path / "none", "source:1") == (
        f"start.from=source:1: round 1 of '{root}' is not finished; only round 0, the dense network, can be started "
        "from"
    )


def test_a_round_that_was_undone_is_refused_with_what_was_tried(tmp_path: Path) -> None:
    run = source_in(tmp_path, rounds=1)
    put(run, 2, good=False, attempt=1, folder="rounds/02/attempt-1")
    put(run, 2, good=False, attempt=2)
    assert refusal(tmp_path, "source:2") == (
        f"start.from=source:2: round 2 of '{run.root}' was undone (25.000%, 25.000% of the weights: more was lost than "
        "target.tolerance); rounds 0 (dense) to 1 can be started from"
    )
    assert found(tmp_path, "source:1").round == 1


def test_a_pruned_round_is_left_at_the_same_tensors_only(tmp_path: Path) -> None:
    source_in(tmp_path)
    config = config_of(tmp_path, "branch", **{"start.from": "source:1"})
    with pytest.raises(UserError, match=r"choose 1\.weight in only one of the two runs: give them as in the source"):
        branch.find(config, network()[:1])
    dense = config_of(tmp_path, "branch", **{"start.from": "source:0"})
    assert branch.find(dense, network()[:1]).origin == Origin(4, 4)


LEVELS = ("scan", "levels", "0123456789abcdef", "000001-000001.jsonl")


def take(folder: Path, start: str) -> Run:
    """A branch that has taken what it needs of a source with a shard of its own."""
    session = few_samples.session_on(folder, [([[255]], 0), ([[0]], 1)], classes=2)
    assert session.config.data.root == str(folder)
    source = source_in(folder, rounds=1)
    for part, value in (("dense", 1.0), ("rounds/01", 2.0), ("rounds/control-01", 3.0)):
        checkpoint.save(source, f"{part}/checkpoint", Checkpoint({"0.weight": torch.full((1,), value)}))
    run_files.dense(Path(source.root))
    run_files.plan(Path(source.root), 1, 0.5)
    source.commit({"levels": 1}, "scan", "trials.json")  # as older runs have it
    source.commit_bytes(b'{"dense": {"top1": 1.0, "loss": 0.5, "samples": 2}}\n', *LEVELS)
    here = few_samples.run_in(folder / "runs/branch")
    branch.take(config_of(folder, "branch", **{"start.from": start}), here, network())
    return here


def test_a_branch_takes_dense_network_control_scan_and_the_round(tmp_path: Path) -> None:
    here = take(tmp_path, "source:1")
    taken = {part: checkpoint.load(here, f"{part}/checkpoint") for part in ("dense", "start", "rounds/control-01")}
    assert [float(each.weights["0.weight"]) for each in taken.values()] == [1.0, 2.0, 3.0]
    for name in ("dense/metrics.json", "scan/trials.json", "start/plan.json", "start/metrics.json"):
        assert here.has(name)
    assert [line.dense for line in journal.read(here, Finding, *LEVELS[:-1])] == [Figures(1.0, 0.5, 2)]
    start = branch.begun(here)
    assert start is not None
    assert (start.run, start.round, start.kept) == ("source", 1, 4)


def test_a_branch_of_the_dense_network_takes_no_round(tmp_path: Path) -> None:
    here = take(tmp_path, "source:0")
    assert here.has("dense/checkpoint/manifest.json")
    assert not here.has("start/checkpoint/manifest.json")
    assert not here.has("rounds/control-01/checkpoint/manifest.json")
    assert [path.name for path in Path(here.path("start")).iterdir()] == ["start.json"]


def test_other_images_are_refused(tmp_path: Path) -> None:
    """The branch's shards are where its data.root says, which may be another place, but they must hold the same."""
    take(tmp_path, "source:1")
    other = tmp_path / "other"
    few_samples.session_on(other, [([[255]], 0), ([[1]], 1)], classes=2)
    here = few_samples.run_in(tmp_path / "runs/strange")
    config = config_of(tmp_path, "strange", **{"start.from": "source:1", "data.root": str(other)})
    with pytest.raises(UserError, match=r"the \w+ images differ from those of '.*source'.*give the same data.root"):
        branch.take(config, here, network())
    assert not here.has("start/start.json")
