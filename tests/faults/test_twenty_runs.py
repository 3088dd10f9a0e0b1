"""Twenty runs at once in one `runs_dir`, with one MLflow server: none meets another."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from faults.runs import Line, Started, same_weights
from support import program
from tiny_run import NO_SCAN, TINY, merged
from tracking_server import TrackingServer, everything, named

from pipeline.settings.config import load_config

pytestmark = [pytest.mark.faults, pytest.mark.slow]
RUNS = 20
SEEDS = 2  # so that a run which took another's state would show


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingServer]:
    """An MLflow server of its own."""
    (tmp_path / "mlflow").mkdir()
    made = TrackingServer(tmp_path / "mlflow")
    for name, value in made.user.items():
        monkeypatch.setenv(name, value)
    made.start()
    yield made
    made.kill()


def test_twenty_runs_on_one_folder_and_one_mlflow(tmp_path: Path, server: TrackingServer, line: Line) -> None:
    path, runs = tmp_path / "tiny.yaml", tmp_path / "runs"
    tracked = {"runs_dir": str(runs), "tracking.enabled": True, "tracking.uri": server.uri}
    path.write_text(yaml.safe_dump(merged(TINY, tracked)))
    for seed in range(SEEDS):
        alone = [f"seed={seed}", f"runs_dir={tmp_path / f'alone-{seed}'}", "tracking.enabled=false"]
        done = program("pipeline", "run", str(path), NO_SCAN, *alone, ray=False)
        assert done.returncode == 0, done.stderr
    names = [f"run-{number:02d}" for number in range(RUNS)]
    started, all_of_them = time.monotonic(), []
    try:
        for number, name in enumerate([*names, names[0]]):  # the last one finds its name in use
            command = [sys.executable, "-m", "pipeline", "run", str(path), NO_SCAN]
            command += [f"name={name}", f"seed={number % SEEDS}"]
            patient = {"SECATEUR_MLFLOW_PATIENCE_S": "300"}
            all_of_them.append(Started(tmp_path / f"log-{number}", command, **patient))
        *twenty, late = all_of_them
        late.finish(2)
        assert late.output.count("error: ") == 1, late.output
        assert f"run '{runs / names[0]}' is being written by process " in late.output
        for run in twenty:
            run.finish()
    finally:
        for run in all_of_them:
            run.kill()
    lost = time.monotonic() - started
    config = load_config(path)
    held = everything(config)
    parents = {run_id: run for run_id, run in held.items() if "mlflow.parentRunId" not in run["tags"]}
    assert sorted(named(parents)) == names
    rounds: dict[str, list[dict[str, object]]] = {name: [] for name in names}
    for run in held.values():
        assert run["info"][1] == "FINISHED"
        if parent := run["tags"].get("mlflow.parentRunId"):
            rounds[parents[parent]["info"][0].split(" · ")[0]].append(run)
    for number, name in enumerate(names):
        assert same_weights(tmp_path / f"alone-{number % SEEDS}/tiny", runs / name)
        run = named(parents)[name]
        assert parents[json.loads((runs / name / "result.json").read_text())["mlflow"]["run_id"]] is run
        assert run["params"]["name"] == name
        assert run["params"]["seed"] == str(number % SEEDS)
        one, like = rounds[name], rounds[names[number % SEEDS]]
        assert len(one) == len(like) >= 2
        assert sorted(map(values, one)) == sorted(map(values, like))
    line(f"{RUNS} runs on one folder and one MLflow", "identical", 0, lost)


def values(run: dict[str, object]) -> list[tuple[str, list[float]]]:
    """What a run in MLflow says of its network: the same for the same seed. Times are a run's own."""
    points: dict[str, list[tuple[int, int, float]]] = run["points"]  # type: ignore[assignment]
    kept = (name for name in sorted(points) if name.startswith(("val", "round/density", "round/compression")))
    return [(name, [value for _, _, value in points[name]]) for name in kept]
