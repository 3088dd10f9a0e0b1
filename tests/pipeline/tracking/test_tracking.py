"""MLflow is made whole from the run directory: once, twice, late, after a crash, with its server away."""

from __future__ import annotations

import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults.proxy import Fault, Proxy
from run_files import CREATED, TOTAL, begin, config, dense, finals, plan, put, round_done, scan, whole
from support import free_port
from tracking_server import TrackingServer, client_of, everything, named, same_everywhere

from pipeline.base.errors import UserError
from pipeline.results import report
from pipeline.run.course import Moment
from pipeline.run.events import Busy
from pipeline.run.lease import Lease
from pipeline.run.records import Ended, RunFacts
from pipeline.settings.config import Config
from pipeline.tracking import curves, store, tracking
from pipeline.tracking import mirror as mirrors
from pipeline.tracking.mirror import Mirror
from pipeline.tracking.server import Server


def test_a_whole_run_reads_back(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = whole(settings)
    report.write(run)
    synced = tracking.sync(run, settings)
    assert synced.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert list(tmp_path.glob("mlartifacts/*"))
    held = everything(settings)
    parts = named(held)
    assert sorted(parts) == ["lenet", "round 1", "round 2", "round 3", "round 4"]
    parent, child = parts["lenet"], parts["round 3"]
    assert child["info"][0] == "lenet · round 3 · 6.67×"
    assert held[synced.run_id] is parent
    assert parent["info"] == ("lenet · 13.7× · no loss · lenet_300_100", "FINISHED", CREATED, CREATED + 75_000 + 2_000)
    assert parent["params"]["target.compression"] == "12.0"
    people = {"verdict": "no loss", "compression": "13.7×", "network": "lenet_300_100"}
    assert people.items() <= parent["tags"].items()
    assert [(step, when) for step, when, _ in parent["points"]["round/compression"]] == [
        (n, CREATED + 20_000 + 10_000 * n) for n in range(5)
    ]
    assert parent["points"]["test/accuracy"][0][2] == 0.9838
    course = sorted(parent["points"]["train/loss"])
    assert [step for step, *_ in course] == [*range(100, 900, 100), *range(900, 2500, 100)]
    assert [step for step, *_ in sorted(parent["points"]["control/loss"])] == [*range(2500, 4100, 100)]
    assert [step for step, *_ in sorted(parent["points"]["compression/val_accuracy"])] == [1, 2, 3, 7, 14]
    expected = {"report.html", "result.json", "config.yaml", "scan/scan.json", "final/model.packed", "layers.json"}
    assert expected <= parent["files"].keys()
    assert parent["files"]["final/model.safetensors"] == 7000
    assert {"figures/rounds.png", "figures/weights/fc1.weight.png"} <= parent["files"].keys()
    assert child["tags"]["mlflow.parentRunId"] == synced.run_id
    assert child["info"][1:] == ("FINISHED", CREATED + 40_000, CREATED + 50_000)
    assert len(child["points"]["val/accuracy"]) == 4
    assert child["files"].keys() == {"plan.json", "metrics.json", "layers.json"}


def test_tables_are_as_mlflow_itself_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", Server(settings.tracking, settings.runs_dir).uri
    )  # load_table asks the global one
    synced = tracking.sync(whole(settings), settings)
    table = client_of(settings).load_table(synced.experiment_id, "layers.json", run_ids=[synced.run_id])
    assert table["name"].tolist() == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert table["kept"].sum() == 19_424


def test_twice_is_once(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = whole(settings)
    first = tracking.sync(run, settings)
    held = everything(settings)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("mlartifacts/**/*") if p.is_file()}
    moved = tmp_path / "elsewhere"
    run.rename(moved)
    for path in moved.rglob("*"):
        os.utime(path, (1, 1))
    assert tracking.sync(moved, settings) == first
    assert everything(settings) == held
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("mlartifacts/**/*") if p.is_file()} == before


def test_grows_with_the_run_into_what_a_single_sync_makes(tmp_path: Path) -> None:
    settings = config(tmp_path / "grown")
    run = begin(settings)
    tracking.sync(run, settings)
    assert named(everything(settings))["lenet"]["info"][1] == "RUNNING"
    dense(run)
    scan(run)
    round_done(run, 1, 0.5)
    plan(run, 2, 0.25)
    tracking.sync(run, settings)
    parts = named(everything(settings))
    assert [parts[n]["info"][1] for n in ("lenet", "round 1", "round 2")] == ["RUNNING", "FINISHED", "RUNNING"]
    for number, density in enumerate((0.54, 0.29, 0.15, 0.0724), start=1):
        round_done(run, number, density, attempt=2 if number == 2 else 1)
    finals(run, settings)
    tracking.sync(run, settings)
    parts = named(everything(settings))
    assert sorted(parts) == ["lenet", "round 1", "round 2", "round 2 (attempt 2)", "round 3", "round 4"]
    assert parts["lenet"]["info"][1] == "FINISHED"
    assert len(parts["lenet"]["points"]["round/val_accuracy"]) == 5


def test_an_interrupted_sync_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    smooth, torn = config(tmp_path / "smooth"), config(tmp_path / "torn")
    tracking.sync(whole(smooth), smooth)
    run = whole(torn)
    for method, allowed in (("log_batch", 2), ("log_artifact", 4), ("create_run", 1), ("log_batch", 4)):
        calls, original = [0], getattr(MlflowClient, method)

        def failing(
            self: Any, *args: Any, calls: Any = calls, allowed: int = allowed, original: Any = original, **kwargs: Any
        ) -> Any:
            calls[0] += 1
            answer = original(self, *args, **kwargs)
            if calls[0] > allowed:
                raise ConnectionResetError("the answer got lost")
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, failing)
            with pytest.raises(UserError, match="did not take the run"):
                tracking.sync(run, torn)
    tracking.sync(run, torn)

    def comparable(held: dict[str, Any]) -> Any:
        return {
            name: (part["info"], part["points"], {k: v for k, v in part["files"].items() if k != "config.yaml"})
            for name, part in named(held).items()
        }

    assert comparable(everything(torn)) == comparable(everything(smooth))
    assert len(everything(torn)) == 5


def test_files_gone_from_the_store_and_twins_are_mended(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = whole(settings)
    synced = tracking.sync(run, settings)
    held = everything(settings)
    next(tmp_path.glob("mlartifacts/*/artifacts/final/model.packed")).unlink()
    client = client_of(settings)
    client.create_run(synced.experiment_id, tags={"secateur.uid": "0123456789abcdef", "secateur.kind": "run"})
    assert tracking.sync(run, settings) == synced
    assert everything(settings) == held


def test_a_setting_changed_on_the_way_is_told(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    tracking.sync(run, settings)
    changed = config(tmp_path, cluster={"workers": 2})
    tracking.sync(run, changed)
    parent = named(everything(settings))["lenet"]
    assert parent["params"]["cluster.workers"] == "1"
    assert parent["tags"]["secateur.changed_settings"] == "cluster.workers: 1 -> 2"


def test_mistakes_are_named(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    synced = tracking.sync(run, settings)
    client_of(settings).delete_experiment(synced.experiment_id)
    with pytest.raises(UserError, match=r"tracking\.experiment='secateur' is deleted"):
        tracking.sync(run, settings)
    put(run / "run.json", RunFacts("x' OR 1=1", "lenet", CREATED))
    with pytest.raises(UserError, match="uid="):
        tracking.sync(run, config(tmp_path, tracking={"experiment": "other"}))


@pytest.mark.slow
def test_a_real_server(tmp_path: Path, tracking_server: TrackingServer) -> None:
    own = {"experiment": "a real server"}  # other tests' runs are on it, too
    settings = config(tmp_path, tracking={"uri": tracking_server.uri, **own})
    run = begin(settings)
    dense(run)
    round_done(run, 1, 0.54)
    tracking.sync(run, settings)
    whole(settings)
    first = tracking.sync(run, settings)
    held = everything(settings)
    assert len(held) == 5
    assert held[first.run_id]["files"]["final/model.safetensors"] == 7000
    assert tracking.sync(run, settings) == first
    assert everything(settings) == held
    text = client_of(settings).download_artifacts(first.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(text).read_text())["verdict"] == "no loss"
    assert not (tmp_path / "mlflow.db").exists()
    sqlite = config(tmp_path, tracking=own)
    tracking.sync(run, sqlite)
    assert same_everywhere(everything(sqlite)) == same_everywhere(held)


@pytest.mark.slow
def test_runs_at_once_into_one_server(tmp_path: Path, tracking_server: TrackingServer) -> None:
    """Also into an experiment that none of them finds."""

    def make(number: int) -> tuple[Path, Config]:
        target = {"uri": tracking_server.uri, "experiment": "at once"}
        settings = config(tmp_path / str(number), name=f"run-{number}", tracking=target)
        run = begin(settings, uid=f"uid{number}")
        for done in range(1, number + 1):
            round_done(run, done, 0.5 / number)
        return run, settings

    runs = [make(number) for number in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        synced = list(pool.map(lambda each: tracking.sync(*each), runs))
    held = everything(runs[0][1])
    assert len(held) == 3 + 1 + 2 + 3
    for number, one in enumerate(synced, start=1):
        mine = [run for run in held.values() if run["tags"]["secateur.uid"] == f"uid{number}"]
        children = [run for run in mine if run["tags"].get("mlflow.parentRunId") == one.run_id]
        assert sorted(run["info"][0].split(" · ")[1] for run in children) == [
            f"round {n}" for n in range(1, number + 1)
        ]
        assert len(mine) == number + 1
        assert {run["points"]["round/density"][0][2] for run in children} == {round(0.5 / number * TOTAL) / TOTAL}


@pytest.mark.slow
def test_answers_that_get_lost_leave_no_twins(tmp_path: Path, tracking_server: TrackingServer) -> None:
    proxy = Proxy(tracking_server.uri)
    settings = config(tmp_path, tracking={"uri": proxy.url, "experiment": "lost answers"})
    run = begin(settings)
    round_done(run, 1, 0.5)
    proxy.fault = Fault("forget", times=1, method="POST", path="/runs/create")
    try:
        tracking.sync(run, settings)
        assert proxy.made == 1
        assert sorted(named(everything(settings))) == ["lenet", "round 1"]
        assert len(everything(settings)) == 2
    finally:
        proxy.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a wrong password", "a wrong name"])
def test_a_server_that_refuses(
    how: str, tmp_path: Path, tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, said = tracking_server.uri, "not authenticated"
    if how == "a wrong password":
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-this-one")
    else:
        uri, said = uri.replace("127.0.0.1", "localhost"), "Invalid Host header"
    settings = config(tmp_path, tracking={"uri": uri})
    with pytest.raises(UserError, match=rf"{said}.*\(set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING") as told:
        tracking.sync(begin(settings), settings)
    assert "not-this-one" not in str(told.value)


def test_mirror_follows_a_run(tmp_path: Path) -> None:
    settings = config(tmp_path)
    problems: list[str] = []
    run = begin(settings)
    lags: list[float] = []
    mirror = Mirror(run, settings, problems.append, lags.append, poll_seconds=0.05)
    dense(run)
    round_done(run, 1, 0.5)
    flushed = mirror.flush(60)
    assert flushed is not None
    assert flushed == mirror.latest
    assert "round 1" in named(everything(settings))
    finals(run, settings)
    closed = mirror.close(60)
    assert closed == flushed
    assert lags == [0.0]
    assert named(everything(settings))["lenet"]["info"][1] == "FINISHED"
    assert problems == []


def test_mirror_rests_between_syncs_that_nobody_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose curves grow all the time is not synced all the time; what it begins with, and its end, come soon."""
    settings, run = config(tmp_path), begin(config(tmp_path))
    syncs: list[tuple[float, float]] = []
    original = tracking.sync

    def timed(*args: Any) -> Any:
        began = time.monotonic()
        try:
            return original(*args)
        finally:
            syncs.append((began, time.monotonic()))

    monkeypatch.setattr(tracking, "sync", timed)
    monkeypatch.setattr(mirrors, "_LONGEST_REST", 2.0)
    started = time.monotonic()
    mirror = Mirror(run, settings, pytest.fail, poll_seconds=0.05)
    step = 0
    while len(syncs) < 3:
        step += 1
        moments(run, Moment(CREATED + step, "dense", step, 10**6, 1.0, loss=2.0, lr=0.1))
        time.sleep(0.02)
    for (began, ended), (following, _) in itertools.pairwise(syncs):
        assert following - ended >= min(2.0, 20 * (ended - began), (ended - started) / 2) - 0.1
    monkeypatch.setattr(mirrors, "_LONGEST_REST", 600.0)
    assert mirror.close(60) is not None
    assert max(step for step, *_ in named(everything(settings))["lenet"]["points"]["train/loss"]) == step


def test_mirror_outlives_a_server_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    away = config(tmp_path, tracking={"uri": f"http://127.0.0.1:{free_port()}"})
    problems: list[str] = []
    lags: list[float] = []
    monkeypatch.setattr(mirrors, "LAG_EVERY_S", 0.2)
    run = begin(away)
    started = time.monotonic()
    mirror = Mirror(run, away, problems.append, lags.append, poll_seconds=0.05)
    assert time.monotonic() - started < 1.0
    until = time.monotonic() + 180
    while not problems and time.monotonic() < until:
        time.sleep(0.05)
    for number in (1, 2, 3):
        round_done(run, number, 0.5)
        time.sleep(0.2)
    assert len(problems) == 1
    assert "tracking.uri='http://127.0.0.1:" in problems[0]
    assert len(lags) > 1
    assert lags == sorted(lags)
    assert min(later - before for before, later in itertools.pairwise([0.0, *lags])) >= 0.19
    assert mirror.close(30) is None
    assert problems[1:] == [f"MLflow does not hold all of this run; when its server answers: secateur sync {run}"]
    back = config(tmp_path)
    tracking.sync(run, back)
    assert len(everything(back)) == 4


def test_mirror_close_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    problems: list[str] = []
    monkeypatch.setattr(tracking, "sync", lambda *_: time.sleep(3))
    mirror = Mirror(begin(settings), settings, problems.append, poll_seconds=0.01)
    started = time.monotonic()
    assert mirror.close(0.3) is None
    assert time.monotonic() - started < 2.0
    assert len(problems) == 1
    assert "the server is too slow" in problems[0]


def moments(run: Path, *lines: Moment) -> None:
    """Lines of the course, as the run's driver adds them."""
    file = run / "course" / "000001-000001.jsonl"
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as journal:
        journal.writelines(json.dumps(line.to_json()) + "\n" for line in lines)


def test_metrics_while_it_trains_stay_as_they_are_when_it_is_done(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    moments(run, Moment(CREATED + 1000, "dense", 50, 800, 1.0, loss=2.0, lr=0.1, images_per_s=640.0, waiting=0.25))
    tracking.sync(run, settings)
    before = named(everything(settings))["lenet"]["points"]
    assert before["train/loss"] == [(50, CREATED + 1000, 2.0)]
    assert {"train/lr", "train/images_per_s", "train/waiting_for_data", "train/density"} <= before.keys()
    moments(
        run,
        Moment(CREATED + 2000, "dense", 800, 800, 1.0, loss=1.0, lr=0.1, val_top1=0.9),
        Moment(CREATED + 3000, "rounds/01", 400, 400, 0.54, loss=1.5, lr=0.1, val_top1=0.8),
        Moment(CREATED + 4000, "rounds/control-01", 400, 400, 1.0, loss=0.5, lr=0.1, val_top1=0.95),
    )
    whole(settings)
    tracking.sync(run, settings)
    after = named(everything(settings))["lenet"]["points"]
    assert sorted(after["train/loss"]) == [
        (50, CREATED + 1000, 2.0), (800, CREATED + 2000, 1.0), (1200, CREATED + 3000, 1.5),
    ]  # fmt: skip
    assert [point[0::2] for point in after["control/val_accuracy"]] == [(1600, 0.95)]


def loss(step: int) -> Moment:
    return Moment(CREATED + 1000 * step, "dense", step, 800, 1.0, loss=2.0 / step)


def test_a_server_is_asked_once_for_the_curves_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again only where a request failed, or another process has logged points meanwhile."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it keeps a point that comes twice
    settings = config(tmp_path, tracking={"uri": f"file://{tmp_path}/store"})
    run, asked = begin(settings), list[str]()
    history, log_batch = MlflowClient.get_metric_history, MlflowClient.log_batch

    def asking(self: Any, run_id: str, key: str) -> Any:
        asked.append(key)
        return history(self, run_id, key)

    def lost(self: Any, *args: Any, **kwargs: Any) -> None:
        log_batch(self, *args, **kwargs)
        if kwargs.get("metrics"):
            raise ConnectionResetError("the answer got lost")

    def elsewhere() -> None:
        """Another process."""
        with monkeypatch.context() as patch:
            patch.setattr(store, "_held", {})
            tracking.sync(run, settings)

    def asked_by(*lines: Moment) -> int:
        asked.clear()
        moments(run, *lines)
        tracking.sync(run, settings)
        return len(asked)

    monkeypatch.setattr(MlflowClient, "get_metric_history", asking)
    moments(run, loss(1))
    elsewhere()
    assert asked_by(loss(2)) > 0
    assert asked_by(loss(3)) == 0
    moments(run, loss(4))
    elsewhere()
    assert asked_by(loss(5)) > 0
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lost)
        with pytest.raises(UserError, match="did not take the run"):
            asked_by(loss(6))
    assert asked_by() > 0
    assert asked_by(loss(7)) == 0
    points = named(everything(settings))["lenet"]["points"]["train/loss"]
    assert sorted(points) == [(step, CREATED + 1000 * step, 2.0 / step) for step in range(1, 8)]


def test_points_go_to_a_server_by_the_thousand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    settings, sizes, original = config(tmp_path), list[int](), MlflowClient.log_batch

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        sizes.append(len(kwargs.get("metrics", ())))
        original(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    run = begin(settings)
    busy(run, *(Busy("a", CREATED + 1000 * second, "c", {"x": 1.0, "y": 2.0}) for second in range(600)))
    tracking.sync(run, settings)
    assert [size for size in sizes if size] == [1000, 200]


def test_points_are_made_of_new_lines_of_machines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, made, original = config(tmp_path), list[int](), curves.Point

    def counted(*args: Any) -> Any:
        made.append(1)
        return original(*args)

    run = begin(settings)
    busy(run, *(line("a", second, 50.0) for second in range(600)))
    tracking.sync(run, settings)
    busy(run, line("a", 600, 60.0))
    monkeypatch.setattr(curves, "Point", counted)
    tracking.sync(run, settings)
    assert len(made) == 1


@pytest.mark.parametrize("how", ["killed", "failed"])
def test_a_run_that_was_ended_says_so_until_it_goes_on(how: Any, tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    plan(run, 1, 0.5)
    put(run / "ended.json", Ended(how, "KeyboardInterrupt", CREATED + 5000))
    tracking.sync(run, settings)
    parts = named(everything(settings))
    assert [parts[name]["info"][1::2] for name in ("lenet", "round 1")] == [(how.upper(), CREATED + 5000)] * 2
    (run / "ended.json").unlink()
    tracking.sync(run, settings)
    assert [part["info"][1] for part in named(everything(settings)).values()] == ["RUNNING", "RUNNING"]


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    dense(run)
    put(run / "lease.json", replace(Lease.mine(1), pid=2**22 + 1))  # no process has such a number
    tracking.sync(run, settings)
    assert named(everything(settings))["lenet"]["info"][1::2] == ("KILLED", CREATED + 20_000)


def busy(run: Path, *lines: Busy) -> None:
    """Lines of the machines, as the run's driver adds them."""
    file = run / "machines" / "000001-000001.jsonl"
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as journal:
        journal.writelines(json.dumps(line.to_json()) + "\n" for line in lines)


def line(node: str, second: int, share: float) -> Busy:
    return Busy(node, CREATED + 1000 * second, "8 × c, 1 × H200", {"cpu_utilization_percentage": share})


@pytest.mark.parametrize("store", ["sqlite", "files"])  # files keep a point that comes twice
def test_what_machines_are_busy_with_comes_once(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = config(tmp_path, tracking={} if store == "sqlite" else {"uri": f"file://{tmp_path}/store"})
    run = begin(settings)
    busy(run, line("a", 10, 50.0), line("b", 11, 25.0))
    tracking.sync(run, settings)
    busy(run, line("a", 40, 60.0), line("b", 9, 20.0))  # another machine's clock is behind
    original = MlflowClient.log_batch

    def lost(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if kwargs.get("metrics"):
            raise ConnectionResetError("the answer got lost")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lost)
        with pytest.raises(UserError, match="did not take the run"):
            tracking.sync(run, settings)
    busy(run, line("a", 70, 70.0))
    for _ in range(2):
        tracking.sync(run, settings)
        parent = named(everything(settings))["lenet"]
        assert {key: sorted(points) for key, points in parent["points"].items()} == {
            "system/a/cpu_utilization_percentage": [
                (10, CREATED + 10_000, 50.0), (40, CREATED + 40_000, 60.0), (70, CREATED + 70_000, 70.0),
            ],
            "system/b/cpu_utilization_percentage": [(9, CREATED + 9000, 20.0), (11, CREATED + 11_000, 25.0)],
        }  # fmt: skip
    assert parent["tags"]["machines"] == "a: 8 × c, 1 × H200; b: 8 × c, 1 × H200"


def test_the_version_that_made_a_run_is_told(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run = begin(settings)
    put(run / "run.json", RunFacts("0123456789abcdef", "lenet", CREATED, "0.1.9"))
    tracking.sync(run, settings)
    assert named(everything(settings))["lenet"]["tags"]["secateur.version"] == "0.1.9"
    finals(run, settings, versions={"secateur": "0.2.0"})
    tracking.sync(run, settings)
    assert named(everything(settings))["lenet"]["tags"]["secateur.version"] == "0.2.0"
