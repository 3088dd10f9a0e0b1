"""Settings of the axes that contradict each other: one sentence, from every command that loads a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import submit
from pipeline.base.errors import UserError
from pipeline.cli import commands

FIXES = "fixes densities, which target.mode=no-loss finds itself: leave"
STEP = "out; target.step says how much a round removes"
UNITS = (
    "needs prune.allocation=budget and target.mode=compression: others count weights (with prune.pattern=channels also "
    "flops and latency)"
)
CHANNELS = ["prune.pattern=channels", "prune.allocation=uniform"]
CASES = [
    (
        ["prune.schedule=list"],
        "prune: schedule=list needs prune.list, the density after each round: [0.5, 0.2, 0.1]",
    ),
    (
        ["prune.schedule=list", "prune.list=[0.1,0.5]"],
        "prune: prune.list=[0.1, 0.5] must fall from round to round",
    ),
    (
        ["prune.allocation=explicit"],
        "prune: allocation=explicit needs prune.densities: {fc1.weight: 0.08, ...}",
    ),
    (["target.budget=flops"], f"target.budget=flops {UNITS}"),
    (
        ["target.budget=bytes", "prune.allocation=budget", "target.mode=thresholds"],
        f"target.budget=bytes {UNITS}",
    ),
    (
        ["target.mode=no-loss", "prune.schedule=cubic"],
        f"prune.schedule=cubic {FIXES} prune.schedule {STEP}",
    ),
    (
        ["target.mode=no-loss", "prune.schedule=one-shot"],
        f"prune.schedule=one-shot {FIXES} prune.schedule {STEP}",
    ),
    (
        ["target.mode=no-loss", "prune.allocation=explicit", "prune.densities={a: 0.5}"],
        f"prune.allocation=explicit {FIXES} prune.allocation {STEP}",
    ),
    (
        ["prune.schedule=cubik"],
        "prune.schedule='cubik' is unknown; did you mean 'cubic'? known: one-shot, geometric, cubic, list",
    ),
    (
        ["prune.allocation=papr"],
        "prune.allocation='papr' is unknown; did you mean 'paper'? known: paper, pooled, uniform, erk, explicit, "
        "budget",
    ),
    (
        ["prune.criterion=magnitud"],
        "prune.criterion='magnitud' is unknown; did you mean 'magnitude'? known: magnitude, taylor, obs, "
        "probabilistic, random",
    ),
    (
        ["prune.pattern=weight"],
        "prune.pattern='weight' is unknown; did you mean 'weights'? known: weights, channels, 2:4",
    ),
    (
        ["prune.pattern=channels", "prune.allocation=erk"],
        "prune.allocation=erk shares out weights, not channels: with prune.pattern=channels use pooled, uniform, "
        "explicit, budget",
    ),
    (
        [*CHANNELS, "target.mode=thresholds"],
        "target.mode=thresholds compares single weights with thresholds: leave prune.pattern=channels out",
    ),
    (
        [*CHANNELS, "target.budget=bytes"],
        "target.budget=bytes counts the bytes of scattered weights: with prune.pattern=channels use weights, "
        "flops or latency",
    ),
    (
        [*CHANNELS, "target.budget=flops", "target.mode=no-loss", "target.compression=null"],
        "target.budget=flops needs target.mode=compression: campaigns count weights",
    ),
    (
        [*CHANNELS, "prune.dead_neurons=true"],
        "prune.dead_neurons has nothing to do with prune.pattern=channels, which leaves no dead units: set it to false",
    ),
    (
        ["data.source=idx"],
        "data: source 'idx' reads from data.root, which is not set: add data.root=PATH",
    ),
    (
        ["data.source=idxx"],
        "data.source='idxx' is unknown; did you mean 'idx'? known: digits, idx, folder, imagenet, shards",
    ),
]


@pytest.mark.parametrize(("overrides", "sentence"), CASES, ids=lambda value: " ".join(value)[:40])
def test_a_command_refuses_what_does_not_fit_when_it_loads_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("name: a\n")
    for load in (
        lambda: commands.load("run.yaml", overrides),  # run, scan, reproduce, shards build
        lambda: commands.load("run.yaml", overrides, needs_data=False),  # plan
        lambda: submit.submit("run.yaml", overrides, None, False),
    ):
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value) == f"config 'run.yaml': {sentence}"
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_what_fits_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("name: a\n")
    for overrides in (
        [],
        ["target.mode=no-loss", "prune.allocation=erk"],
        ["target.budget=flops", "prune.allocation=budget"],
        ["prune.schedule=list", "prune.list=[0.5,0.2]"],
    ):
        assert commands.load(file, overrides).name == "a"
