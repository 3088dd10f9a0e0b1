"""A whole tiny run without Ray: every stage, skipped when finished, resumed to the bit, honest about faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL
from support import ROOT, program
from tiny_run import ALONE, carry_out, equal, final_weights

from pipeline import stages
from pipeline.base import seeding
from pipeline.base.errors import RunStopped, UserError
from pipeline.data import shards
from pipeline.export import packed
from pipeline.local import LocalEngine
from pipeline.network import cost
from pipeline.network.build import build_network
from pipeline.prune import round_plan
from pipeline.rounds import campaign, preflight
from pipeline.run.events import EpochEnded, Event, LevelMeasured, Noted, Resumed, RoundBegun, StageBegun, unheard
from pipeline.run.records import Scan
from pipeline.run.state import Run, fingerprint, run_root
from pipeline.settings.config import Config
from pipeline.train import checkpoint
from pipeline.train.loop import Training
from pipeline.train.world import configure_process


def test_a_run_reaches_its_target_and_says_what_it_did(tiny: Callable[..., Config]) -> None:
    config = tiny()
    result = carry_out(config)
    root = Path(run_root(config))
    assert result["weights_total"] == 64 * 300 + 300 * 100 + 100 * 10
    assert result["weights_kept"] == result["weights_total"] // 6
    assert result["compression"] >= 6
    weights = final_weights(config)
    nonzero = {row["name"]: int((weights[row["name"]] != 0).sum()) for row in result["layers"]}
    assert nonzero == {row["name"]: row["kept"] for row in result["layers"]}
    assert packed.read(root / "final/model.packed").keys() == weights.keys()
    assert result["bytes"]["packed"] == (root / "final/model.packed").stat().st_size
    assert result["test_looks"] == 1
    assert result["test"]["samples"] == 360
    assert (root / "report.html").read_text().count("<svg") > 3
    assert json.loads((root / "result.json").read_text()) == result


def test_each_rounds_thresholds_rest_on_the_dense_networks_deviations(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"prune.dense_control": False})
    carry_out(config)
    here = stages.Run(run_root(config), 1)
    dense, first = (checkpoint.load(here, f"{part}/checkpoint") for part in ("dense", "rounds/01"))
    scan, plan = here.load(Scan, "scan", "scan.json"), here.read("rounds/02", "plan.json")
    total = sum(mask.numel() for mask in first.masks.values())
    expected = round_plan.make(
        round_plan.Basis(
            config.prune,
            config.target,
            config.seed,
            {name: dense.weights[name] for name in first.masks},
            round_plan.scanned("weights", scan, 10, dict.fromkeys(first.masks, 0)),
        ),
        campaign.outlook(config.prune, config.target, campaign.Origin(total, total), 1)[1],
        round_plan.Standing({name: first.weights[name] for name in first.masks}, first.masks),
    )
    assert {row["name"]: row["keep"] for row in plan["tensors"]} == expected.keep


@pytest.mark.parametrize(
    ("unit", "more"), [("weights", {}), ("flops", {}), ("bytes", {"prune.gradual": 0.5, "prune.gradual_every": 5})]
)
def test_a_budget_is_solved_from_the_scan_and_says_what_it_expects(
    tiny: Callable[..., Config], unit: str, more: dict[str, Any]
) -> None:
    limits = {"prune.floors": {"fc3.*": 0.3}, "prune.ceilings": {"fc2.weight": 0.2}}
    quick = {"dense.epochs": 1, "retrain.epochs": 1, "prune.dense_control": False, "target.compression": 8}
    config = tiny(**quick, **limits, **more, **{"prune.allocation": "budget", "target.budget": unit})
    result = carry_out(config)
    root = Path(run_root(config))
    kept = {row["name"]: row["kept"] for row in result["layers"]}
    total = {"weights": 50200, "flops": 2 * 50200, "bytes": 4 * 50200}[unit]
    last = json.loads((root / "rounds/02/plan.json").read_text())["predicted"]
    assert (last["unit"], last["budget"]) == (unit, total // 8)
    assert 0 <= last["budget"] - last["spent"] < {"weights": 1, "flops": 2, "bytes": 50}[unit]
    assert last["spent"] == sum(cost.price(unit, row["weights"], row["flops"])(row["kept"]) for row in result["layers"])
    assert kept["fc3.weight"] >= 300
    assert kept["fc2.weight"] <= 6000
    assert last["least"] <= last["rise"] < last["least"] + 0.01
    assert ("predicted by" in (root / "report.html").read_text()) == (not more)


def test_a_run_can_reconstruct_instead_of_retraining(tiny: Callable[..., Config]) -> None:
    config = tiny(
        **{
            "prune.criterion": "obs", "prune.reconstruct_samples": 300, "prune.statistics_samples": 200,
            "retrain.epochs": 0, "target.compression": 2, "scan.levels": [0.5],
        }
    )  # fmt: skip
    result = carry_out(config)
    root = Path(run_root(config))
    rounds = [json.loads((root / f"rounds/0{number}/metrics.json").read_text()) for number in (1, 2)]
    for facts in rounds:
        assert facts["steps"] == 0
        assert facts["val_before_retrain"]["top1"] == facts["val"]["top1"]
        assert [fit["name"] for fit in facts["reconstruction"]] == ["fc1.weight", "fc2.weight", "fc3.weight"]
        assert all(fit["reconstructed"] < fit["masked"] for fit in facts["reconstruction"])
    assert not (root / "rounds/01/pruned").exists()
    assert result["weights_kept"] == result["weights_total"] // 2
    assert result["val"]["pruned"]["top1"] > result["val"]["dense"]["top1"] - 0.1
    assert result["test"]["dense_control"]["loss"] == result["test"]["dense"]["loss"]


def test_a_finished_run_is_not_run_again(tiny: Callable[..., Config]) -> None:
    config = tiny()
    first = carry_out(config)
    events: list[Event] = []
    assert carry_out(config, events) == first
    assert [event.stage for event in events if isinstance(event, StageBegun) and event.skipped] == [
        "shards",
        "dense",
        "scan",
        "rounds",
        "final",
    ]
    assert not any(isinstance(event, EpochEnded | RoundBegun | LevelMeasured) for event in events)


@pytest.mark.parametrize(
    ("lost", "made", "looks"),
    [
        ("final/model.safetensors", ["final"], 1),
        ("report.html", ["final"], 1),
        ("final/test_answers.npz", ["rounds"], 2),
        ("scan/scan.json", ["scan"], 1),
        ("dense/checkpoint", ["dense"], 1),
    ],
)
def test_what_was_deleted_of_a_finished_run_is_made_again(
    tiny: Callable[..., Config], lost: str, made: list[str], looks: int
) -> None:
    config = tiny(**{"dense.epochs": 1, "retrain.epochs": 1, "prune.rounds": 1})
    carry_out(config)
    root = Path(run_root(config))
    before = {path: path.read_bytes() for path in root.rglob("*.safetensors")}
    shutil.rmtree(root / lost) if (root / lost).is_dir() else (root / lost).unlink()
    events: list[Event] = []
    result = carry_out(config, events)
    assert [event.stage for event in events if isinstance(event, StageBegun) and not event.skipped] == made
    assert (root / lost).exists()
    assert {path: path.read_bytes() for path in root.rglob("*.safetensors")} == before
    assert result["test_looks"] == 1  # as the run ended; a second look at test is on record
    assert len((root / "test_looks.jsonl").read_text().splitlines()) == looks


@pytest.mark.parametrize(
    ("phase", "step"), [("dense", 15), ("rounds/01", 9), ("rounds/02", 0), ("rounds/control-02", 20)]
)
def test_a_run_stopped_anywhere_ends_with_the_same_bits(
    tiny: Callable[..., Config],
    interrupt: Callable[[str, int], None],
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    step: int,
) -> None:
    undisturbed = tiny(name="undisturbed")
    expected = carry_out(undisturbed)
    config = tiny(name="stopped")
    interrupt(phase, step)
    with pytest.raises(KeyboardInterrupt):
        carry_out(config)
    monkeypatch.undo()
    events: list[Event] = []
    result = carry_out(config, events)
    assert equal(final_weights(config), final_weights(undisturbed))
    assert result["test"] == expected["test"]
    if step > 10:
        assert any(isinstance(event, Resumed) and event.phase == phase for event in events)


def test_a_scan_goes_on_with_the_levels_that_are_missing(tiny: Callable[..., Config]) -> None:
    config = tiny()
    seen: list[str] = []

    def stop_after_three(event: Event) -> None:
        if isinstance(event, LevelMeasured):
            seen.append(event.tensor)
            if len(seen) == 3:
                raise KeyboardInterrupt

    configure_process(config.threads)
    with pytest.raises(KeyboardInterrupt):
        stages.run(config, LocalEngine(ALONE), stop_after_three)
    events: list[Event] = []
    carry_out(config, events)
    assert len([event for event in events if isinstance(event, LevelMeasured)]) == 3 * 2 - 3
    scan = json.loads((Path(run_root(config)) / "scan/scan.json").read_text())
    assert [[level["density"] for level in tensor["levels"]] for tensor in scan["tensors"]] == [[0.5, 0.1]] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"prune.allocation": "uniform", "prune.schedule": "one-shot"},
        {"prune.allocation": "erk", "prune.schedule": "cubic"},
        {"prune.allocation": "pooled", "prune.schedule": "list", "prune.list": [0.5, 0.2]},
        {"prune.allocation": "explicit", "prune.densities": {"fc1.weight": 0.1, "fc[23].weight": 0.5}},
        {"target.mode": "thresholds", "prune.sigma": "renewed"},
        {"prune.criterion": "random", "prune.allocation": "uniform", "prune.dense_control": False},
        {"retrain.optimizer": "adamw", "retrain.lr": 0.001, "retrain.l1": 1e-5, "retrain.precision": "bf16"},
        {"prune.criterion": "probabilistic", "prune.survivors": "reinitialise"},
    ],
)
def test_every_mode_goes_through(tiny: Callable[..., Config], changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    result = carry_out(config)
    kept = {row["name"]: row["density"] for row in result["layers"]}
    if config.prune.allocation == "explicit":
        assert kept == pytest.approx({"fc1.weight": 0.1, "fc2.weight": 0.5, "fc3.weight": 0.5}, abs=1e-3)
    elif config.target.mode == "compression" and config.prune.schedule != "list":
        assert result["weights_kept"] == result["weights_total"] // 6
    if config.prune.schedule == "list":
        assert result["density"] == pytest.approx(0.2, abs=1e-4)
    assert (result["test"]["dense_control"] is None) == (not config.prune.dense_control)


def rounds_of(config: Config) -> list[dict[str, Any]]:
    return [
        json.loads((Path(run_root(config)) / f"rounds/0{n}/metrics.json").read_text())
        for n in range(1, config.prune.rounds + 1)
    ]


PAPER = {
    **SMALL, "retrain.lr": None, "retrain.lr_scale": 0.1, "retrain.dropout_correction": True, "prune.bn_samples": 500,
    "retrain.phases": ["fc", "conv", "all"], "prune.dead_neurons": True, "scan.bn_samples": 250,
    "target.compression": 20,
}  # fmt: skip


def test_the_papers_recipe_goes_through_and_a_stop_in_a_phase_changes_no_bit(
    tiny: Callable[..., Config], interrupt: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stopped = tiny(name="undisturbed", **PAPER), tiny(name="stopped", **PAPER)
    result = carry_out(config)
    for metrics in rounds_of(config):
        plan = json.loads((Path(run_root(config)) / f"rounds/0{metrics['round']}/plan.json").read_text())
        assert metrics["dead"] == sum(tensor["dead"] for tensor in plan["tensors"])
        assert metrics["kept"] == plan["budget"] == sum(layer["kept"] for layer in metrics["layers"])
        [fc1] = [layer for layer in metrics["layers"] if layer["name"] == "fc1.weight"]
        assert metrics["dropout"] == {"drop1": pytest.approx(0.5 * fc1["density"] ** 0.5)}
        assert metrics["history"][0]["lr"] < 0.005  # a tenth of 0.05, on its way down
    total, dead = result["weights_total"], rounds_of(config)[-1]["dead"]
    assert dead > 0
    assert result["weights_kept"] == total // 20 - dead
    interrupt("rounds/02", 20)  # of 40: in the second phase
    with pytest.raises(KeyboardInterrupt):
        carry_out(stopped)
    monkeypatch.undo()
    assert carry_out(stopped)["test"] == result["test"]
    assert equal(final_weights(stopped), final_weights(config))


def test_survivors_made_anew_keep_the_pattern_alone(tiny: Callable[..., Config]) -> None:
    """With one update too small to matter, what is left is each round's own initialisation, masked."""
    recipe = {"retrain.steps": 1, "retrain.lr": 1e-12, "prune.allocation": "uniform", "prune.dense_control": False}
    anew = tiny(name="anew", **recipe, **{"prune.survivors": "reinitialise"})
    kept = tiny(name="kept", **recipe)
    for config in (anew, kept):
        carry_out(config)
    for number in (1, 2):
        saved = checkpoint.load(stages.Run(run_root(anew), 1), f"rounds/0{number}/checkpoint")
        fresh = build_network(anew.model, 10, seeding.derive(0, "survivors", number)).state_dict()
        for name, weight in saved.weights.items():
            expected = fresh[name] * saved.masks[name] if name in saved.masks else fresh[name]
            torch.testing.assert_close(weight, expected)
    dense = checkpoint.load(stages.Run(run_root(kept), 1), "dense/checkpoint").weights["fc1.weight"]
    left = final_weights(kept)["fc1.weight"]
    torch.testing.assert_close(left, dense * (left != 0))


def driver_of(config: Config) -> stages.Driver:
    """A driver of a run that has not begun."""
    return stages.Driver(config, LocalEngine(ALONE), stages.Run("nowhere", 0), unheard)


def test_settings_of_the_recipe_belong_to_the_stage_that_uses_them(tiny: Callable[..., Config]) -> None:
    def changed(**changes: Any) -> list[str]:
        before, after = driver_of(tiny()), driver_of(tiny(**changes))
        parts = (stages.DENSE, stages.SCAN, stages.ROUNDS)
        return [part.name for part in parts if part.settings(before) != part.settings(after)]

    assert changed(**{"scan.bn_samples": 10}) == ["scan"]
    for key, value in {
        "prune.bn_samples": 10, "prune.survivors": "reinitialise", "prune.dead_neurons": True,
        "retrain.dropout_correction": True, "retrain.phases": ["fc", "all"],
    }.items():  # fmt: skip
        assert changed(**{key: value}) == ["rounds"]


def test_a_setting_that_came_later_leaves_the_stages_of_earlier_runs_finished(tiny: Callable[..., Config]) -> None:
    """What runs were marked with before there was prune.pattern; a later setting counts where it is not the default."""
    marked = {"dense": "1c7c78d057e7ea5d", "scan": "0e5f1abc812c14fc", "rounds": "82446920706469b1"}

    def made_from(config: Config) -> dict[str, str]:
        parts = (stages.DENSE, stages.SCAN, stages.ROUNDS)
        return {part.name: fingerprint(*part.settings(driver_of(config))) for part in parts}

    older = {"data.decoder": "pillow"}
    assert made_from(tiny(**older)) == marked
    other = made_from(tiny(**older, **{"prune.pattern": "other"}))
    assert [stage for stage in marked if other[stage] != marked[stage]] == ["scan", "rounds"]


def test_masks_that_are_not_kept_stop_the_run(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard must see weights, not masks: something that brings one pruned weight back is caught by name."""
    original = Training.fit

    def revive(self: Training) -> Any:
        position = original(self)
        if self.phase == "rounds/01":
            with torch.no_grad():
                weight = self.parameters["fc2.weight"]
                weight[~self.masks["fc2.weight"]] = 0.5
            self.applier.clean = lambda: None  # type: ignore[method-assign]
        return position

    monkeypatch.setattr(Training, "fit", revive)
    with pytest.raises(RunStopped, match=r"round 1: .*fc2\.weight"):
        carry_out(tiny())


def test_a_learning_rate_that_diverges_stops_before_the_update(tiny: Callable[..., Config]) -> None:
    config = tiny(**{"dense.lr": 1e30})
    with pytest.raises(RunStopped, match=r"dense: the gradient of step \d+ is not finite"):
        carry_out(config)
    saved = checkpoint.latest(stages.Run(run_root(config), 1), "dense")
    assert saved is None or all(torch.isfinite(weight).all() for weight in saved.weights.values())


def test_unreadable_images_are_counted_and_too_many_stop_the_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny()
    root = tmp_path / "shards"
    made = shards.build(config.data, 0, str(root), None)
    tar = root / made.splits["train"][0].name
    content = bytearray(tar.read_bytes())
    for offset in made.splits["train"].rows(0).offsets[:40].tolist():
        image = content.index(b"\x89PNG", offset)
        content[image : image + 32] = b"\0" * 32
    tar.write_bytes(content)
    foreign = {"data.source": "shards", "data.root": str(root)}
    shards.index(str(root), label="cls", val_fraction=0.1, seed=0, num_classes=None, progress=None)
    with pytest.raises(
        RunStopped,
        match=r"\d\d of 1\d\d\d images of train are unreadable.*max_bad_fraction=0\.01: .*train-00000\.tar/00",
    ):
        carry_out(tiny(name="strict", **foreign))
    result = carry_out(tiny(name="lenient", **foreign, **{"data.max_bad_fraction": 0.1}))
    assert result["verdict"] in ("no loss", "undecided", "loss")


def test_no_ray_is_imported_and_a_run_without_it_works(tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked/ray").mkdir(parents=True)
    (tmp_path / "blocked/ray/__init__.py").write_text("raise ImportError('Ray is blocked by this test')\n")
    paths = f"{tmp_path / 'blocked'}:{ROOT}"
    done = program("pipeline", "run", str(tiny_yaml), ray=False, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert "compression" in done.stdout


def test_shards_that_are_missing_are_one_message(tiny: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="secateur shards"):
        carry_out(tiny(**{"data.source": "shards", "data.root": str(tmp_path / "nowhere")}))


def test_mlflow_shows_the_run_and_a_child_for_each_round(tiny: Callable[..., Config]) -> None:
    import mlflow

    config = tiny(**{"tracking.enabled": True})
    result = carry_out(config)
    client = mlflow.MlflowClient(tracking_uri=result["mlflow"]["tracking_uri"])
    parent = client.get_run(result["mlflow"]["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["prune.rounds"] == "2"
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "result.json", "config.yaml"} <= artifacts
    steps = [(m.step, m.value) for m in client.get_metric_history(parent.info.run_id, "round/sparsity")]
    rounds = [json.loads((Path(run_root(config)) / f"rounds/0{n}/metrics.json").read_text()) for n in (1, 2)]
    assert dict(steps)[2] == pytest.approx(1 - rounds[1]["density"])
    children = client.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent.info.run_id}'",
        order_by=["attributes.start_time"],
    )
    assert len(children) == 2
    for child, metrics in zip(children, rounds, strict=True):
        assert child.data.metrics["round/sparsity"] == pytest.approx(1 - metrics["density"])
        assert child.data.metrics["round/val_accuracy"] == pytest.approx(metrics["val"]["top1"])
        assert client.list_artifacts(child.info.run_id)


@pytest.mark.parametrize(("allocation", "sparse"), [("uniform", 0.2), ("paper", 0.2), ("uniform", 0.01)])
def test_zeros_of_a_network_that_is_given_are_never_counted_as_kept(
    tiny: Callable[..., Config], tmp_path: Path, allocation: str, sparse: float
) -> None:
    """One tensor has a fifth or a hundredth of its weights, and density 0.5 is asked for."""
    base = tiny()
    state = build_network(base.model, 10, 3).state_dict()
    weight = state["fc1.weight"]
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) >= sparse] = 0.0
    nonzero, small = int((weight != 0).sum()), state["fc2.weight"]
    small.view(-1)[0] = 0.0  # one zero says nothing
    path = tmp_path / "sparse.pth"
    torch.save(state, path)
    recipe = {"dense.epochs": 0, "retrain.epochs": 1, "prune.rounds": 1, "target.compression": 2}
    config = tiny(**recipe, **{"model.checkpoint": str(path), "prune.allocation": allocation})
    events: list[Event] = []
    result = carry_out(config, events)
    said = f"is sparse already: {19200 - nonzero:,} of its 50,200 prunable weights are 0, and count as pruned"
    assert [event for event in events if isinstance(event, Noted) and said in event.text]
    rows = {row["name"]: row for row in result["layers"]}
    assert rows["fc1.weight"]["kept"] <= nonzero
    assert result["weights_kept"] == 25100
    kept = final_weights(config)["fc1.weight"] != 0
    assert not (kept & (weight == 0)).any()
    if allocation == "uniform":
        assert rows["fc1.weight"]["kept"] == nonzero  # less than the share of the others
        assert rows["fc2.weight"]["density"] == pytest.approx((25100 - nonzero) / 31000, abs=1e-4)


def given_sparse(tiny: Callable[..., Config], folder: Path, every: int, compression: float) -> Config:
    """A run of two rounds of a network that is given with one of so many weights."""
    state = build_network(tiny().model, 10, 3).state_dict()
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        state[name].view(-1)[torch.arange(state[name].numel()) % every != 0] = 0.0
    torch.save(state, folder / "sparse.pth")
    return tiny(**{
        "model.checkpoint": str(folder / "sparse.pth"), "dense.epochs": 0, "retrain.epochs": 1, "prune.rounds": 2,
        "prune.allocation": "uniform", "target.compression": compression,
    })  # fmt: skip


def test_rounds_of_a_network_that_is_given_sparse_begin_at_what_it_has(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config = given_sparse(tiny, tmp_path, every=5, compression=20)
    result = carry_out(config)
    assert [each["density"] for each in result["rounds"]] == [0.1, 0.05]  # half of a fifth, and half of that
    fresh = Run(str(tmp_path / "none"), 0)
    counts = preflight.known_counts(config.data, 0, fresh)
    assert preflight.check_network(config, counts, fresh).begin.kept == 10040


def test_a_network_that_is_given_sparser_than_asked_for_keeps_all_that_it_has(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    result = carry_out(given_sparse(tiny, tmp_path, every=10, compression=4))
    assert result["weights_kept"] == 5020
    assert result["compression"] == 10


def test_a_checkpoint_of_another_network_lists_what_does_not_fit(tiny: Callable[..., Config], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"fc1.weight": torch.zeros(7, 64), "extra": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"missing: .*fc2\.weight.*unexpected: extra.*fc1\.weight \(7, 64\) for \(300, 64\)"
    ):
        carry_out(tiny(**{"model.checkpoint": str(path)}))
