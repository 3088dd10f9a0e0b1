"""What a job takes along, and how its log is followed over connections that drop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiohttp import web
from faults.proxy import Fault, Proxy
from support import free_port

from cluster import job_env, submit
from pipeline.base.errors import UserError
from pipeline.settings.config import Config
from pipeline.storage import s3 as boto


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("env_var: {A: b}", "unknown key 'env_var'; did you mean 'env_vars'?"),
        ("{pipp: [x], env_vars: {}}", "unknown key 'pipp'; did you mean 'pip'?"),
        ("working_dir: /x", "working_dir is the current folder"),
        ("env_vars: {A: 1}", "env_vars"),
        ("env_vars: [", "is not valid YAML"),
        ("- pip", "must be a mapping"),
    ],
)
def test_a_runtime_env_that_ray_would_not_carry_out_is_refused(
    text: str, words: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"--runtime-env={file}.*{re.escape(words)}"):
        job_env.make(tiny(), str(file), tmp_path)


def test_data_and_runs_below_the_folder_stay_behind(tiny: Callable[..., Config], tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("{env_vars: {A: b}, excludes: [notes]}")
    config = tiny(**{"runs_dir": f"{tmp_path}/out/here", "data.source": "idx", "data.root": f"{tmp_path}/mnist"})
    made = job_env.make(config, str(file), tmp_path)
    assert {"/out/here", "/mnist", "notes", "runs", "*.tar"} <= set(made["excludes"])
    assert made["working_dir"] == str(tmp_path)
    assert made["env_vars"]["A"] == "b"
    elsewhere = tiny(**{"runs_dir": "s3://b/runs", "data.source": "idx", "data.root": "/data/mnist"})
    assert job_env.make(elsewhere, None, tmp_path)["excludes"] == job_env.EXCLUDES


def test_a_folder_that_ray_would_refuse_is_refused_before_it_is_packed(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "big").mkdir()
    with (tmp_path / "big/weights.bin").open("wb") as file:
        file.truncate(600 * 2**20)
    with pytest.raises(UserError, match=r"holds 600 MiB of the 5\d\d MiB that Ray takes: big \(600 MiB\)"):
        job_env.make(tiny(runs_dir="/elsewhere"), None, tmp_path)
    job_env.make(tiny(runs_dir=f"{tmp_path}/big"), None, tmp_path)
    (tmp_path / ".gitignore").write_text("big\n")
    job_env.make(tiny(runs_dir="/elsewhere"), None, tmp_path)


@pytest.mark.parametrize("changes", [{}, {"start.from": "another:0"}])
@pytest.mark.parametrize("how", ["no credentials", "no rights", "no store"])
def test_a_machine_without_a_way_to_the_store_leaves_the_checks_to_the_job(
    how: str,
    changes: dict[str, str],
    tiny: Callable[..., Config],
    s3: str,
    moto: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny(runs_dir=f"{s3}/runs", **changes)
    monkeypatch.setattr(boto, "_served", False)
    monkeypatch.setattr(boto, "_reached", False)
    proxy = Proxy(moto)
    proxy.fault = Fault("refuse", times=-1, method="", status=403, code="AccessDenied")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}" if how == "no store" else proxy.url)
    if how == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    boto.client.cache_clear()
    submit.check(config)
    proxy.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"cannot be seen from this machine: '{s3}/runs/")
    assert said[0].endswith("; the network is checked by the job")


@pytest.mark.parametrize("runs_dir", ["s3:///runs", "s3://me:secret@bucket/runs"])
def test_an_address_that_no_machine_can_use_is_refused_before_a_job_is_made(
    runs_dir: str, tiny: Callable[..., Config]
) -> None:
    with pytest.raises(UserError, match="s3://"):
        submit.check(tiny(runs_dir=runs_dir))


@contextmanager
def dashboard(
    log: list[str], cuts: list[int], ending: dict[str, Any], held: float = 0.0, unanswered: int = 0
) -> Iterator[str]:
    """Speaks Ray's jobs API for one job: each connection to its log is cut after so many lines, the last is not.

    A connection that will be cut is held for some seconds before its last line. So many requests for the job's state
    are not answered.
    """
    left, silent = list(cuts), [None] * unanswered

    async def version(_: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": ""})

    async def jobs(_: web.Request) -> web.Response:
        return web.json_response([])

    async def job(request: web.Request) -> web.Response:
        if silent:
            silent.pop()
            assert request.transport is not None
            request.transport.abort()
        state = {"status": "RUNNING"} if left else ending
        facts = {"type": "SUBMISSION", "entrypoint": "x", "submission_id": "a", "message": "said", **state}
        return web.json_response(facts)

    async def whole(_: web.Request) -> web.Response:
        return web.json_response({"logs": "".join(log)})

    async def tail(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        lines = log[: left[0]] if left else log
        for number, line in enumerate(lines, 1):
            if left and number == len(lines):
                await asyncio.sleep(held)
            await socket.send_str(line)
        if left:
            left.pop(0)
            assert request.transport is not None
            request.transport.abort()
        await socket.close()
        return socket

    loop, port = asyncio.new_event_loop(), free_port()

    async def serve() -> None:
        app = web.Application()
        app.add_routes([web.get("/api/version", version), web.get("/api/jobs/", jobs), web.get("/api/jobs/a", job)])
        app.add_routes([web.get("/api/jobs/a/logs/tail", tail), web.get("/api/jobs/a/logs", whole)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()

    loop.run_until_complete(serve())
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": None}, 1),
        ({"status": "STOPPED", "driver_exit_code": None}, 130),
    ],
)
def test_a_log_is_shown_once_over_connections_that_drop_and_the_exit_code_is_the_jobs(
    ending: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_AGAIN_S", 0.01)
    log = [f"line {number}\n" for number in range(6)]
    with dashboard(log, [2, 0, 5], ending) as url:
        assert asyncio.run(submit._follow(submit._client(url), "a", url)) == code
    written = capsys.readouterr()
    assert written.out.startswith("".join(log))
    assert [text for text in written.out.splitlines() if text.startswith("line")] == [text.strip() for text in log]


def test_a_connection_that_held_for_long_is_tried_again_when_it_drops(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience counts from the last sign of life, not from when the connection was made."""
    monkeypatch.setattr(submit, "_AGAIN_S", 0.01)
    monkeypatch.setattr(submit, "PATIENCE_S", 0.5)
    log = ["line 0\n", "line 1\n"]
    with dashboard(log, [2], {"status": "SUCCEEDED", "driver_exit_code": 0}, held=1.0, unanswered=3) as url:
        assert asyncio.run(submit._follow(submit._client(url), "a", url)) == 0
    written = capsys.readouterr()
    assert written.out.startswith("".join(log))
    assert written.err.count("lost; trying again") == 1


def test_a_cluster_that_does_not_come_back_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_AGAIN_S", 0.01)
    monkeypatch.setattr(submit, "PATIENCE_S", 0.5)
    with dashboard([], [], {"status": "SUCCEEDED"}) as url:
        client = submit._client(url)
    nowhere = f"http://127.0.0.1:{free_port()}"
    client._address = nowhere
    with pytest.raises(UserError, match=r"has not answered for .* job a may still run"):
        asyncio.run(submit._follow(client, "a", nowhere))
    assert capsys.readouterr().err.count("lost; trying again") == 1
