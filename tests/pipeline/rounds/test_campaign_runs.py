"""Real campaigns without loss on digits, and branches: undone, resumed to the bit, taken up by another run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import few_samples
import pytest
import torch
from tiny_run import ALONE, TINY, carry_out, final_weights, merged

from pipeline import stages, storage
from pipeline.base.errors import UserError
from pipeline.cli import commands
from pipeline.data import shards
from pipeline.local import LocalEngine
from pipeline.rounds import attempts, branch, outlook
from pipeline.run.contents import read
from pipeline.run.events import EpochEnded, Event, LevelMeasured, Noted, Resumed
from pipeline.run.layout import attempt_folder, trail
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config, parse_config
from pipeline.tracking.records import child, parent
from pipeline.train import checkpoint
from pipeline.train.loop import Training
from pipeline.train.world import configure_process

Events = list[Event]
# A step to 2% of the weights loses far more than 20 points; small ones do not.
CAMPAIGN: dict[str, Any] = {
    "name": "campaign", "prune.allocation": "uniform", "retrain.steps": 12, "retrain.checkpoint_steps": 5,
    "dense.epochs": 2,
    "target": {"mode": "no-loss", "step": 0.02, "confidence": 0.5, "tolerance": 0.2, "max_rounds": 2},
}  # fmt: skip


def make(runs: Path, **changes: Any) -> Config:
    return parse_config(merged({**TINY, "runs_dir": str(runs)}, changes))


def result_and_events(config: Config) -> tuple[dict[str, Any], Events]:
    events: Events = []
    return carry_out(config, events), events


def to_test(config: Config) -> Events:
    """A run up to its look at test, which leaves out the seconds that a report takes; its events."""
    configure_process(config.threads)
    events: Events = []
    engine = LocalEngine(ALONE)
    with open_run(config) as here:
        stages.carry_out(stages.up_to(config, stages.ROUNDS), stages.Driver(config, engine, here, events.append))
    return events


def run_of(config: Config) -> Run:
    return Run(run_root(config), 0)


def bits(config: Config) -> dict[str, list[bytes]]:
    """What a run's numbers rest on; the times are left out."""
    root = Path(run_root(config))
    found = [*root.rglob("weights.safetensors"), *root.rglob("masks.bin"), root / "final/test.json"]
    found += [*root.rglob("rounds/**/plan.json"), *root.rglob("rounds/**/metrics.json")]
    times = (b'"seconds"', b'"finished_ms"', b'"images_per_s"', b'"waiting"')
    return {
        str(path.relative_to(root)): [
            line for line in path.read_bytes().splitlines() if not line.strip().startswith(times)
        ]
        for path in found
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that read shards of the digits, made once."""
    root = tmp_path_factory.mktemp("shards")
    shards.build(make(root).data, 0, str(root), None)
    return {"data.source": "shards", "data.root": str(root)}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, str]) -> tuple[Config, dict[str, Any], Events]:
    config = make(tmp_path_factory.mktemp("runs"), **CAMPAIGN, **digits)
    return config, *result_and_events(config)


def test_a_campaign_goes_back_where_too_much_was_lost(campaign: tuple[Config, dict[str, Any], Events]) -> None:
    config, result, events = campaign
    rows, run = result["rounds"], run_of(config)
    undone = [row for row in rows if not row["accepted"]]
    kept = [row for row in rows if row["accepted"]]
    assert undone
    assert [row["round"] for row in kept] == [1, 2]
    assert result["density"] == kept[-1]["density"] < kept[0]["density"] < 1
    assert rows[0]["planned_density"] == 0.02
    assert rows[1]["planned_density"] == pytest.approx(0.02**0.5)
    for row in undone:  # the record stays, the checkpoint does not
        folder = attempt_folder(row["round"], row["attempt"])
        metrics = run.read(folder, "metrics.json")
        assert metrics["against_dense"]["drop"] > 0.2
        assert run.read(folder, "plan.json")["attempt"] == row["attempt"]
        assert storage.list_folders(run.path(folder)) == []
    assert [row["seconds"] for row in rows] == [metrics.seconds for metrics in trail(run)]
    assert sum(isinstance(event, Noted) and "is undone" in event.text for event in events) == len(undone)
    assert result["test_looks"] == 1
    control = run.read("rounds", "control.json")
    assert len(control["history"]) == sum(len(run.read(f"rounds/0{n}", "metrics.json")["history"]) for n in (1, 2))
    orders = [run.read(f"rounds/0{n}", "metrics.json")["history"][0]["order"] for n in (1, 2)]
    assert [entry["order"] for entry in control["history"]] == orders


def test_report_and_mlflow_tell_attempts_apart(campaign: tuple[Config, dict[str, Any], Events]) -> None:
    config, result, _ = campaign
    run = read(run_root(config))
    assert [(each.number, each.attempt) for each in run.rounds] == [
        (row["round"], row["attempt"]) for row in result["rounds"]
    ]
    whole = parent(run, config).points
    children = [child(run, each, config, whole) for each in run.rounds]
    assert [each.tags["secateur.accepted"] for each in children] == [
        str(row["accepted"]).lower() for row in result["rounds"]
    ]
    assert len({tuple(each.identity.values()) for each in children}) == len(children)
    for each in children:
        assert sorted(artifact.path for artifact in each.artifacts) == ["layers.json", "metrics.json", "plan.json"]
    course = [point for point in whole if point.key == "round/density"]
    assert [point.step for point in course] == [0, 1, 2]
    text = Path(run_root(config), "report.html").read_text()
    assert text.count("(undone)") == sum(not row["accepted"] for row in result["rounds"])
    assert "went back to the round before" in text


def test_a_campaign_killed_again_and_again_ends_with_the_same_bits(
    campaign: tuple[Config, dict[str, Any], Events], digits: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Within attempts, before a refused one is undone, and before each of the four removals that undo it."""
    config = make(tmp_path, **CAMPAIGN, **digits)
    later = shutil.ignore_patterns("rounds", "final", "result.json", "report.html", "test_looks.jsonl")
    shutil.copytree(run_root(campaign[0]), run_root(config), ignore=later)
    run = run_of(config)

    def killed(place: Any, name: str, when: Callable[..., bool]) -> None:
        original = getattr(place, name)

        def stop(*args: Any) -> Any:
            if when(*args):
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(place, name, stop)
        with pytest.raises(KeyboardInterrupt):
            to_test(config)
        monkeypatch.undo()

    def at(step: int, undone: int) -> Callable[..., bool]:
        return lambda training, *_: (
            training.phase == "rounds/01"
            and training.position.step == step
            and run.has("rounds/01/attempt-1/metrics.json") == bool(undone)
        )

    killed(Training, "_update", at(7, undone=0))
    killed(attempts, "settle", lambda _: run.has("rounds/01/metrics.json"))
    for name, part in (("tree", "checkpoint"), ("tree", "steps"), ("", "plan.json"), ("", "metrics.json")):
        killed(storage, f"remove_{name}" if name else "remove", lambda url, *_, part=part: (
            url.endswith(f"rounds/01/{part}") and run.has("rounds/01/attempt-1/metrics.json")
        ))  # fmt: skip
    killed(Training, "_update", at(7, undone=1))
    events = to_test(config)
    assert [event.step for event in events if isinstance(event, Resumed)] == [5]
    assert bits(config) == bits(campaign[0])


def test_a_campaign_that_accepts_nothing_hands_over_the_dense_network(digits: dict[str, str], tmp_path: Path) -> None:
    target = {**CAMPAIGN["target"], "tolerance": 0.0, "step": 0.9, "smallest_step": 0.94}
    config = make(tmp_path, **{**CAMPAIGN, "target": target, "retrain.lr": 1.0, "retrain.steps": 1, **digits})
    result, events = result_and_events(config)
    assert [row["accepted"] for row in result["rounds"]] == [False]
    assert (result["compression"], result["verdict"]) == (1, "no loss")
    assert result["weights_kept"] == result["weights_total"] == 50200
    assert result["val"]["pruned"] == result["val"]["dense"]
    assert result["test"]["dense_control"] is None
    assert result["test"]["pruned"] == result["test"]["dense"]
    assert any(isinstance(event, Noted) and "no round was accepted" in event.text for event in events)
    dense = checkpoint.load(run_of(config), "dense/checkpoint").weights
    final = final_weights(config)
    assert all(torch.equal(final[name], dense[name]) for name in dense)
    text = Path(run_root(config), "report.html").read_text()
    assert "Nothing was pruned" in text
    assert "it had less training" not in text
    with pytest.raises(UserError, match=r"round 1 of .* was undone \(90.\d+% of the weights.*only round 0"):
        outlook.make(make(tmp_path, name="further", **{"start.from": "campaign:1", "dense.epochs": 2, **digits}))


def test_a_plan_shows_the_rounds_of_a_campaign_and_that_they_may_be_undone(tmp_path: Path) -> None:
    config = make(tmp_path, **{"prune.allocation": "uniform", "target": {"mode": "no-loss", "compression": 6}})
    with pytest.raises(UserError, match="144 val images"):
        outlook.make(config)
    made = outlook.make(config.model_copy(update={"target": config.target.model_copy(update={"tolerance": 0.05})}))
    assert [row.kept for row in made.rounds] == [25100, 12550, 8366]
    [note] = [note for note in made.notes if "no-loss" in note]
    assert "undone" in note
    assert "5 points" in note
    assert "target.compression=6 ends the run" in note
    with pytest.raises(UserError, match="144 val images"):
        to_test(config)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, digits: dict[str, str]) -> Config:
    """A run with a scan, whose rounds are at 0.5 and 0.2."""
    lists = {"prune.schedule": "list", "prune.list": [0.5, 0.2], "retrain.epochs": 1, "dense.epochs": 2}
    config = make(tmp_path_factory.mktemp("branches"), name="source", **lists, **digits)
    to_test(config)
    return config


def branch_of(source: Config, name: str, changes: dict[str, Any]) -> Config:
    return parse_config(merged(source.model_dump(mode="json"), {"name": name, **changes}))


def test_a_branch_goes_on_as_its_source_did(source: Config) -> None:
    """From round 1 to the density of round 2: the same batches, so the same bits; and nothing is measured twice."""
    config = branch_of(source, "again", {"start.from": "source:1", "prune.list": [0.2]})
    events = to_test(config)
    ours, theirs = bits(config), bits(source)
    assert ours["rounds/01/checkpoint/weights.safetensors"] == theirs["rounds/02/checkpoint/weights.safetensors"]
    for same in ("rounds/control-02/checkpoint/weights.safetensors", "final/test.json"):
        assert ours[same] == theirs[same]
    assert not any(isinstance(event, LevelMeasured) for event in events)
    assert {event.phase for event in events if isinstance(event, EpochEnded)} == {"rounds/01", "rounds/control-02"}


def test_a_branch_prunes_further_and_says_where_it_comes_from(source: Config) -> None:
    wanted = {"start.from": "source:2", "prune.schedule": "geometric", "target.compression": 20}
    config = branch_of(source, "further", wanted)
    made = outlook.make(config)
    assert [row.kept for row in made.rounds] == [5020, 2510]  # of 50,200: 0.2, 0.1, 0.05
    assert made.dense_steps == 0
    assert any("starts from round 2" in note for note in made.notes)
    result = carry_out(config)
    before = checkpoint.load(run_of(source), "rounds/02/checkpoint").masks
    after = checkpoint.load(run_of(config), "rounds/02/checkpoint").masks
    assert all(bool((before[name] | ~after[name]).all()) for name in before)
    assert result["compression"] == 20
    begun = result["lineage"]
    assert (begun["run"], begun["round"], begun["generation"]) == ("source", 2, 2)
    assert (begun["density"], begun["ancestors"]) == (pytest.approx(0.2), [])
    assert "Branched off from round 2 of source" in Path(run_root(config), "report.html").read_text()
    tags = parent(read(run_root(config)), config).tags
    assert (tags["secateur.source_run"], tags["secateur.source_round"]) == ("source", "2")
    control = run_of(config).read("rounds", "control.json")["history"]
    assert len(control) == 4  # an epoch for each round of the lineage
    home = Path(run_root(source))
    home.rename(home.with_name("moved"))  # the branch stands alone
    try:
        assert carry_out(config) == result
    finally:
        home.with_name("moved").rename(home)
    last = branch_of(config, "last", {"start.from": "further:1", "prune.schedule": "one-shot"})
    to_test(last)
    found = branch.begun(run_of(last))
    assert found is not None
    assert (found.run, found.generation, [each.run for each in found.ancestors]) == ("further", 3, ["source"])


def test_branches_of_round_0_share_one_dense_training(source: Config) -> None:
    config = branch_of(source, "shared", {"start.from": "source:0", "prune.list": [0.3], "prune.allocation": "erk"})
    events = to_test(config)
    assert not any(isinstance(event, EpochEnded) and event.phase == "dense" for event in events)
    assert run_of(config).read("final", "test.json")["dense"] == run_of(source).read("final", "test.json")["dense"]
    assert run_of(config).read("start", "start.json")["density"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"start.from": "source:3"}, r"round 3 of '.*source' is not finished; rounds 0 \(dense\) to 2 can be started"),
        ({"start.from": "nowhere:1"}, r"'.*nowhere' is not a run"),
        ({"name": "source"}, "is this run itself"),
        ({"seed": 1, "dense.lr": 0.07}, r"these settings differ: dense.lr: 0.05 -> 0.07; seed: 0 -> 1; give them"),
        ({"model.kwargs": {"inputs": 64}}, r"differ: model.kwargs.dropout: 0.1 -> None"),
        ({"prune.exclude": ["fc3.*"]}, "same tensors.*choose fc3.weight in only one"),
        ({"prune.list": [0.4, 0.1]}, r"prune.list=\[0.4, 0.1\] removes nothing.*has 10,040 of 50,200"),
    ],
)
def test_branches_that_do_not_fit_are_refused(source: Config, changes: dict[str, Any], words: str) -> None:
    config = branch_of(source, "bad", {"start.from": "source:2", "prune.list": [0.1], **changes})
    with pytest.raises(UserError, match=words):
        outlook.make(config)


def test_other_data_under_the_same_settings_are_noticed(source: Config, tmp_path: Path) -> None:
    root = shutil.copytree(str(source.data.root), tmp_path / "shards")
    manifest = shards.load_manifest(str(root))
    (shard, rows), *rest = manifest.splits["val"].described()
    few_samples.rewrite(root, manifest, splits={"val": [(shard._replace(sha256=shard.sha256[::-1]), rows), *rest]})
    config = branch_of(source, "other", {"start.from": "source:2", "prune.list": [0.1], "data.root": str(root)})
    with pytest.raises(UserError, match="the val images differ from those of"):
        to_test(config)


def test_a_relative_path_to_a_source_is_made_absolute(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_yaml.parent)
    loaded = commands.load(tiny_yaml, ["start.from=runs/a:3"])
    assert loaded.start.source == f"{tiny_yaml.parent}/runs/a:3"
    assert commands.load(tiny_yaml, ["start.from=a:3"]).start.source == "a:3"
