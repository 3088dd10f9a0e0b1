"""One writer of a run on S3: the lease, its heartbeat, and who may take it over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from faults.proxy import Fault, Proxy
from support import ROOT, environment

from pipeline import storage
from pipeline.base import process
from pipeline.base.errors import RunStopped, UserError
from pipeline.run.state import Run, open_run, run_root
from pipeline.settings.config import Config
from pipeline.storage import s3 as boto

Tiny = Callable[..., Config]


@pytest.fixture
def remote(tiny: Tiny, s3: str) -> Tiny:
    """The config of a tiny run on S3, whose lease lasts 3 s."""
    return lambda **changes: tiny(**{"runs_dir": f"{s3}/runs", "cluster.lease_seconds": 3, **changes})


@pytest.fixture
def proxy(s3: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """S3 is reached through it from here on."""
    made = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    boto.client.cache_clear()
    yield made
    made.close()


def lease_of(config: Config) -> dict[str, Any]:
    return dict(storage.read_json(f"{run_root(config)}/lease.json"))


def forge(config: Config, **changes: Any) -> None:
    """A lease as another writer would have left it."""
    with open_run(config):
        pass
    storage.write_json(f"{run_root(config)}/lease.json", {**lease_of(config), "released": False, **changes})


def test_a_second_writer_is_refused_while_the_first_lives(remote: Tiny) -> None:
    with open_run(remote()):
        time.sleep(4)  # longer than the lease: it is the heartbeat that holds it
        with (
            pytest.raises(
                UserError, match=rf"is being written by process {os.getpid()} on .*, last heartbeat \d s ago"
            ),
            open_run(remote()),
        ):
            pass
    with open_run(remote()) as again:  # given back, so at once
        assert again.fence == 2


def test_an_orphan_cannot_commit_after_a_take_over(remote: Tiny) -> None:
    with open_run(remote()) as first:
        first.commit({"a": 1}, "x.json")
        storage.write_json(first.path("lease.json"), {**lease_of(remote()), "released": True})
        with open_run(remote()) as second:
            assert second.fence == first.fence + 1
            with pytest.raises(RunStopped, match="taken over by process"):
                first.commit({"a": 2}, "x.json")
            assert second.read("x.json") == {"a": 1}
            time.sleep(0.7)  # the first's heart finds that the lease is another's, and leaves it alone
            assert lease_of(remote())["fence"] == second.fence
            second.commit({"a": 3}, "x.json")


def test_the_lease_of_a_silent_writer_elsewhere_is_waited_for_and_taken_over(remote: Tiny) -> None:
    forge(remote(), machine="another", host="elsewhere", pid=77, seconds=2)
    said: list[str] = []
    started = time.monotonic()
    with open_run(remote(), said.append) as here:
        assert here.fence == 2
    assert 1 < time.monotonic() - started < 60  # S3 tells times in whole seconds
    assert said == ["waiting for the lease of process 77 on elsewhere to end (2 s)"]


def test_a_writer_elsewhere_that_renews_its_lease_meanwhile_is_left_alone(remote: Tiny) -> None:
    forge(remote(), machine="another", host="elsewhere", seconds=60)
    said: list[str] = []

    def beat(text: str) -> None:
        said.append(text)
        storage.write_json(f"{run_root(remote())}/lease.json", {**lease_of(remote()), "beats": 99})

    with (
        pytest.raises(UserError, match=r"on elsewhere, last heartbeat \d+ s ago.*taken over 60 s after"),
        open_run(remote(), beat),
    ):
        pass
    assert len(said) == 1


def test_a_lease_that_is_given_back_meanwhile_is_taken_at_once(remote: Tiny) -> None:
    forge(remote(), machine="another", host="elsewhere", seconds=3600)

    def give_back(text: str) -> None:
        storage.write_json(f"{run_root(remote())}/lease.json", {**lease_of(remote()), "released": True})

    with open_run(remote(), give_back) as here:
        assert here.fence == 2


def test_a_dead_process_of_this_machine_is_taken_over_at_once(remote: Tiny) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    forge(remote(), pid=dead.pid, seconds=3600)
    with open_run(remote()) as here:
        assert here.fence == 2
    forge(remote(), pid=os.getppid(), start=process.started(os.getppid()), seconds=3600)  # alive
    with pytest.raises(UserError, match="is being written"), open_run(remote()):
        pass


def test_a_process_that_has_the_id_of_a_dead_one_is_not_taken_for_it(remote: Tiny) -> None:
    forge(remote(), pid=os.getppid(), start=1, seconds=3600)
    with open_run(remote()) as here:
        assert here.fence == 2


def test_a_writer_with_the_number_of_another_cannot_commit(remote: Tiny) -> None:
    with open_run(remote()) as first:
        other = Run(first.root, first.fence, "another token")
        with pytest.raises(RunStopped, match="taken over by process"):
            other.commit({}, "x.json")
        Run(first.root, first.fence, first.token).commit({}, "x.json")  # a worker of this driver


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_a_write_that_is_tried_again_after_a_take_over_does_not_land(remote: Tiny, proxy: Proxy, method: str) -> None:
    config = remote(**{"cluster.lease_seconds": 60})
    ended: list[BaseException] = []

    def write(run: Run) -> None:
        try:
            run.commit({"a": 2}, "x.json") if method == "PUT" else run.remove("x.json")
        except RunStopped as error:
            ended.append(error)

    with open_run(config) as first:
        first.commit({"a": 1}, "x.json")
        proxy.fault = Fault("refuse", times=-1, method=method, path="x.json")
        writer = threading.Thread(target=write, args=(first,))
        writer.start()
        while proxy.made < 2:
            time.sleep(0.001)
        storage.write_json(first.path("lease.json"), {**lease_of(config), "released": True})
        with open_run(config) as second:
            assert second.fence == first.fence + 1
            proxy.fault = None
            writer.join(60)
            assert "taken over by process" in str(ended[0])
            assert second.read("x.json") == {"a": 1}


# Opens a run, and then writes x.json and again, until it must not.
WRITER = (
    "import json, sys, time; from pipeline.settings.config import parse_config\n"
    "from pipeline.run.state import open_run\n"
    "from pipeline.base.errors import RunStopped\n"
    "try:\n"
    "    with open_run(parse_config(json.loads(sys.argv[1]))) as run:\n"
    "        while True: run.commit({}, 'x.json'); print('written', flush=True); time.sleep(0.2)\n"
    "except RunStopped as error: print(error, flush=True)\n"
)


def test_a_writer_that_was_stopped_for_longer_than_its_lease_writes_no_more(remote: Tiny) -> None:
    text = json.dumps(remote().model_dump(mode="json"))
    command = [sys.executable, "-c", WRITER, text]
    writer = subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGSTOP)
        time.sleep(4)
        before = lease_of(remote())  # nobody takes the run over
        writer.send_signal(signal.SIGCONT)
        said = writer.communicate(timeout=60)[0].splitlines()
    finally:
        writer.kill()
        writer.wait()
    assert set(said[:-1]) <= {"written"}, said  # before it was stopped
    assert "its lease was not renewed for " in said[-1]
    assert "longer than cluster.lease_seconds=3" in said[-1]
    assert lease_of(remote()) == before


def test_a_worker_of_a_driver_that_is_silent_for_longer_than_the_lease_writes_no_more(remote: Tiny) -> None:
    forge(remote(), seconds=1)
    lease = lease_of(remote())
    worker = Run(run_root(remote()), lease["fence"], lease["token"])
    worker.commit({}, "x.json")
    time.sleep(3)  # S3 tells times in whole seconds
    with pytest.raises(RunStopped, match=r"was not renewed for \d s .*cluster\.lease_seconds=1,"):
        worker.commit({}, "x.json")


def test_a_renewal_whose_answer_is_lost_for_good_is_known_as_ours(
    remote: Tiny, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(remote()) as run:
        monkeypatch.setenv("SECATEUR_STORAGE_RETRIES", "0")
        proxy.fault = Fault("forget", method="PUT", path="lease.json")
        time.sleep(5)
        assert proxy.made == 1
        run.commit({}, "x.json")


@pytest.mark.parametrize("method", ["", "PUT"])
def test_a_store_that_ignores_conditions_is_refused(remote: Tiny, proxy: Proxy, s3: str, method: str) -> None:
    proxy.fault = Fault("strip", times=-1, method=method)
    words = rf"runs_dir={s3}/runs: its store.* ignores If-None-Match and If-Match, .*use a store that heeds them"
    with pytest.raises(UserError, match=words), open_run(remote()):
        pass
    assert storage.list_folders(s3) == []  # nothing is left of the attempt
    proxy.fault, proxy.requests = None, []
    with open_run(remote()):
        pass
    assert len([path for _, path, _ in proxy.requests if ".probe-" in path]) == 4


def test_a_run_whose_lease_was_removed_stops(remote: Tiny) -> None:
    with open_run(remote()) as run:
        storage.remove(run.path("lease.json"))
        with pytest.raises(RunStopped, match=r"has no lease\.json any more"):
            run.commit({}, "x.json")


def test_changed_settings_stop_and_leave_the_lease(remote: Tiny) -> None:
    with open_run(remote()) as here:
        here.commit({}, "dense", "something.json")
    before = lease_of(remote())
    with pytest.raises(UserError, match=r"seed: 0 -> 5.*use another name"), open_run(remote(seed=5)):
        pass
    assert lease_of(remote()) == before


def test_of_writers_that_start_together_one_gets_the_run(remote: Tiny, s3: str) -> None:
    text = json.dumps(remote().model_dump(mode="json"))
    program = (
        "import json, sys, time; from pipeline.settings.config import parse_config\n"
        "from pipeline.run.state import open_run\n"
        "from pipeline.base.errors import UserError\n"
        "try:\n"
        "    with open_run(parse_config(json.loads(sys.argv[1]))): print('in', flush=True); sys.stdin.read()\n"
        "except UserError as error: print('out', flush=True); sys.stdin.read()\n"
    )
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", program, text], cwd=ROOT, env=environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = sorted(each.stdout.readline().strip() for each in contenders if each.stdout)
    for each in contenders:
        each.communicate()
    assert said == ["in", "out", "out"]


def test_uploads_that_a_killed_writer_left_are_ended(remote: Tiny) -> None:
    from pipeline.storage import s3 as boto

    bucket, key = boto.place(run_root(remote()))
    boto.client().create_multipart_upload(Bucket=bucket, Key=f"{key}/dense/checkpoint/weights.safetensors")
    with open_run(remote()):
        assert "Uploads" not in boto.client().list_multipart_uploads(Bucket=bucket)


def test_a_run_on_s3_asks_for_a_tracking_server(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"runs_dir=s3://b/runs cannot hold MLflow's sqlite file.*tracking\.uri"):
        tiny(**{"runs_dir": "s3://b/runs", "tracking.enabled": True})
    tiny(**{"runs_dir": "s3://b/runs", "tracking.enabled": True, "tracking.uri": "http://mlflow:5000"})


def test_runs_are_not_kept_on_a_web_server(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="cannot be written"), open_run(tiny(runs_dir="http://x/runs")):
        pass
