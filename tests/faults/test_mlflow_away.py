"""A tracking server that is away, slow or refuses: the run is the same to the bit, and MLflow is whole after a sync."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults.gated import FACTORY, Gate
from faults.proxy import Fault, Proxy
from faults.runs import Started, same_weights
from support import ROOT, alone_on_the_network, program
from tiny_run import TINY, merged
from tracking_server import TrackingServer, everything, same_everywhere

from pipeline.cli import commands
from pipeline.run.state import config_of

pytestmark = [pytest.mark.faults, pytest.mark.slow]
# Rounds of some seconds, so that there is a middle.
LONGER = {
    "tracking.enabled": True, "data.resize": 28, "data.size": 28, "model.kwargs.inputs": 784, "dense.epochs": 5,
    "retrain.epochs": 30, "retrain.checkpoint_steps": 50, "prune.allocation": "uniform", "model.factory": FACTORY,
}  # fmt: skip
PATIENCE_S = 5.0
PATIENT = {"SECATEUR_MLFLOW_PATIENCE_S": "120"}
COMMAND = "secateur sync"


class LocalRun(Started):
    """`python -m pipeline run` on its way."""

    def __init__(self, root: Path, uri: str, *prefix: str, cwd: Path = ROOT, **extra: str) -> None:
        self.root, self.folder, config = root, root / "runs/tiny", root / "tiny.yaml"
        config.write_text(yaml.safe_dump(merged({**TINY, "runs_dir": str(root / "runs")}, LONGER)))
        command = [*prefix, sys.executable, "-m", "pipeline", "run", str(config), f"tracking.uri={uri}"]
        patient = {"SECATEUR_MLFLOW_PATIENCE_S": str(PATIENCE_S), **extra}
        super().__init__(root / f"log-{time.monotonic_ns()}", command, cwd, **patient)

    @property
    def rounds_seconds(self) -> float:
        """What its rounds took, by its own clock."""
        return float(json.loads((self.folder / "rounds/finished.json").read_text())["seconds"])

    @property
    def waited_s(self) -> float:
        """Seconds from the last stage's end to that of the process, which has just ended."""
        marker = json.loads((self.folder / "final/finished.json").read_text())
        return time.time() - marker["finished_ms"] / 1000


@dataclass(frozen=True)
class Undisturbed:
    """A run whose server was never away."""

    run: LocalRun
    seconds: float
    shape: dict[str, Any]  # of what MLflow holds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    made = TrackingServer(tmp_path_factory.mktemp("mlflow"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.user.items():
            patch.setenv(name, value)
        try:
            made.start()
            yield made
        finally:
            made.kill()


@pytest.fixture
def up(server: TrackingServer) -> TrackingServer:
    """The server, running whatever a test before has done to it."""
    if server.process is None:
        server.start()
    return server


@pytest.fixture
def proxy(up: TrackingServer) -> Iterator[Proxy]:
    made = Proxy(up.uri)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = LocalRun(tmp_path_factory.mktemp("undisturbed"), server.uri, **PATIENT)
    seconds = run.finish()
    assert "warning" not in run.output
    held = of_this_run(run)
    assert held == from_scratch(run)
    return Undisturbed(run, seconds, shape(held))


def of_this_run(run: LocalRun) -> dict[str, Any]:
    """What the run's server holds of it, by name."""
    config = config_of(run.folder)
    uid = json.loads((run.folder / "run.json").read_text())["uid"]
    held = {key: each for key, each in everything(config).items() if each["tags"]["secateur.uid"] == uid}
    return same_everywhere(held)


def from_scratch(run: LocalRun) -> dict[str, Any]:
    """What a server holds that has seen the run's folder only once, as it is now."""
    database = f"sqlite:///{run.root}/again.db"
    commands.sync(run.folder, database)
    config = config_of(run.folder)
    elsewhere = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": database})})
    return same_everywhere(everything(elsewhere))


MEASURED = ("seconds", "images_per_s", "waiting")  # in the names of metrics that no two runs have in common


def shape(held: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one seed have in common: everything but times, sizes, how busy machines were, and folders."""
    return {
        name: {
            "status": part["info"][1],
            "params": {key: value for key, value in part["params"].items() if key != "runs_dir"},
            "tags": {key for key in part["tags"] if not key.startswith("mlflow.secateur.artifacts")},
            "points": {
                key: [
                    step if any(word in key for word in MEASURED) else (step, value)
                    for step, _, value in sorted(points)
                ]
                for key, points in part["points"].items()
                if not key.startswith("system/")
            },
            "files": set(part["files"]),
        }
        for name, part in held.items()
    }


def whole_after_sync(run: LocalRun, undisturbed: Undisturbed) -> None:
    """The weights are the undisturbed run's; after a sync, and after a second, MLflow is what it would have been."""
    assert same_weights(undisturbed.run.folder, run.folder)
    assert "resumed" not in run.output  # nothing was done twice
    server = config_of(run.folder).tracking.uri  # named, since it is sent a password
    first = commands.sync(run.folder, server)
    assert json.loads((run.folder / "result.json").read_text())["mlflow"] == first.place.model_dump()
    held = of_this_run(run)
    assert shape(held) == undisturbed.shape
    assert commands.sync(run.folder, server) == first
    assert of_this_run(run) == held == from_scratch(run)


def test_away_from_the_start(
    server: TrackingServer, undisturbed: Undisturbed, tmp_path: Path, line: Callable[..., None]
) -> None:
    server.kill()
    run = LocalRun(tmp_path, server.uri)
    seconds = run.finish()
    assert run.waited_s < PATIENCE_S + 20
    assert run.output.count("The run goes on; MLflow is tried again") == 1, run.output
    assert run.output.count(COMMAND) == 1
    server.start()
    typed = program("cluster", "sync", str(run.folder), "--uri", server.uri, ray=False)
    assert typed.returncode == 0, typed.stderr
    whole_after_sync(run, undisturbed)
    line("MLflow away from the start", "identical", 0, seconds - undisturbed.seconds)


def test_away_in_the_middle(
    up: TrackingServer, undisturbed: Undisturbed, tmp_path: Path, line: Callable[..., None]
) -> None:
    """Killed in round 1, back while the run goes on."""
    run = LocalRun(tmp_path, up.uri)
    run.wait((run.folder / "rounds/01/plan.json").exists)
    up.kill()
    run.wait(lambda: "The run goes on" in run.output or (run.folder / "rounds/02/plan.json").exists())
    up.start()
    seconds = run.finish()
    assert run.output.count(COMMAND) <= 1, run.output
    whole_after_sync(run, undisturbed)
    line("MLflow away in the middle", "identical", 0, seconds - undisturbed.seconds)


def test_away_at_the_end(
    up: TrackingServer, undisturbed: Undisturbed, tmp_path: Path, line: Callable[..., None]
) -> None:
    run = LocalRun(tmp_path, up.uri)
    run.wait((run.folder / "rounds/finished.json").exists)
    up.kill()
    seconds = run.finish()
    assert run.waited_s < PATIENCE_S + 20
    assert run.output.count(COMMAND) == 1, run.output
    assert json.loads((run.folder / "result.json").read_text())["mlflow"] is None
    up.start()
    whole_after_sync(run, undisturbed)
    line("MLflow away at the end", "identical", 0, seconds - undisturbed.seconds)


@pytest.mark.parametrize("kind", ["delay", "hang"])
def test_slow(kind: str, proxy: Proxy, undisturbed: Undisturbed, tmp_path: Path, line: Callable[..., None]) -> None:
    """Every answer late, or none at all: the rounds take as long as ever, and the end waits no longer than it says."""
    proxy.fault = Fault(kind, times=-1, method="", seconds=3.0)
    run = LocalRun(tmp_path, proxy.url)
    seconds = run.finish()
    waited = run.waited_s
    ratio = run.rounds_seconds / undisturbed.run.rounds_seconds
    print(f"{kind}: rounds x{ratio:.2f} of {undisturbed.run.rounds_seconds:.1f} s, waited {waited:.1f} s")
    assert proxy.made > 0
    assert ratio < 2
    assert PATIENCE_S - 1 < waited < PATIENCE_S + 20
    assert run.output.count(COMMAND) == 1, run.output
    assert "the server is too slow" in run.output
    proxy.fault = None
    time.sleep(2 * 3.0)  # what the run had sent last is still carried out, after its end
    whole_after_sync(run, undisturbed)
    line("MLflow slow" if kind == "delay" else "MLflow hangs", "identical", 0, seconds - undisturbed.seconds)


@pytest.mark.parametrize("how", ["401: wrong password", "403: wrong name", "500"])
def test_refuses(
    how: str,
    up: TrackingServer,
    proxy: Proxy,
    undisturbed: Undisturbed,
    tmp_path: Path,
    line: Callable[..., None],
) -> None:
    password = {"MLFLOW_TRACKING_PASSWORD": "hunter2"} if how.startswith("401") else {}
    uri = up.uri.replace("127.0.0.1", "localhost") if how.startswith("403") else proxy.url
    proxy.fault = Fault("refuse", times=-1, method="", status=500) if how == "500" else None
    run = LocalRun(tmp_path, uri, **password)
    seconds = run.finish()
    assert run.waited_s < PATIENCE_S + 20
    assert how[:3] in run.output or "not authenticated" in run.output, run.output
    assert ("set MLFLOW_TRACKING_USERNAME" in run.output) == (how != "500")
    assert "hunter2" not in run.output
    assert run.output.count(COMMAND) == 1, run.output
    proxy.fault = None
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("//localhost", "//127.0.0.1"))
    whole_after_sync(run, undisturbed)
    line(f"MLflow refuses ({how})", "identical", 0, seconds - undisturbed.seconds)


def test_a_run_goes_on_in_the_same_mlflow_run_on_another_machine(
    up: TrackingServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Another host name, working directory and place of the run's folder."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    gate = Gate(tmp_path / "gate")
    gate.close("train", there, "runs/tiny/rounds/01/steps/*/manifest.json")
    first = LocalRun(there, up.uri, **gate.environment)
    first.wait((first.folder / "config.yaml").exists)
    parent = first.wait(lambda: parent_id(first))
    first.wait(gate.held)
    first.kill()
    there.rename(here)
    renamed = ["unshare", "--uts", "sh", "-c", 'hostname another-machine && exec "$@"', "sh"]
    other = renamed if alone_on_the_network() else []  # where unshare is allowed
    again = LocalRun(here, up.uri, *other, cwd=tmp_path, **PATIENT)
    again.finish()
    assert "resumed at step" in again.output
    assert same_weights(undisturbed.run.folder, again.folder)
    assert parent_id(again) == parent
    assert json.loads((again.folder / "result.json").read_text())["mlflow"]["run_id"] == parent
    assert shape(of_this_run(again)) == undisturbed.shape


def parent_id(run: LocalRun) -> str | None:
    """The one MLflow run that is this run's parent."""
    config = config_of(run.folder)
    uid = json.loads((run.folder / "run.json").read_text())["uid"]
    wanted = {"secateur.uid": uid, "secateur.kind": "run"}.items()
    found = [key for key, each in everything(config).items() if wanted <= each["tags"].items()]
    assert len(found) <= 1
    return found[0] if found else None
