"""A spot notice is found as AWS gives it, and the command that tells Ray is one that Ray takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import spot


class Metadata(BaseHTTPRequestHandler):
    """AWS's metadata service, version 2: a token by PUT, without which nothing is told."""

    action: bytes | None = None
    broken = False

    def do_PUT(self) -> None:
        known = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer(200 if known else 400, b"the-token")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "the-token":
            self._answer(401, b"")
        elif type(self).broken:
            type(self).broken = False
            self._answer(500, b"")
        elif self.path == "/latest/meta-data/spot/instance-action" and self.action is not None:
            self._answer(200, self.action)
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    made = type("Made", (Metadata,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), made)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(spot, "LOOK_EVERY_S", 0.01)
    yield made
    server.shutdown()
    server.server_close()


def test_nothing_is_planned(service: type[Metadata]) -> None:
    assert spot.notice() is None


def test_a_notice_is_waited_for_and_found(service: type[Metadata], capsys: pytest.CaptureFixture[str]) -> None:
    service.broken = True
    looks = []

    def look() -> str | None:
        looks.append(1)
        if len(looks) == 3:
            service.action = b'{"action": "terminate", "time": "2026-01-01T00:00:00Z"}'
        return spot.notice()

    assert spot.watch(look) == "terminate"
    assert len(looks) == 3
    assert "asking on" in capsys.readouterr().out


def ray_that(monkeypatch: pytest.MonkeyPatch, folder: Path, *answers: str) -> Path:
    """In the place of Python, which carries out Ray's command: answers in turn. Returns where it writes its calls."""
    program, calls = folder / "python", folder / "calls"
    cases = "\n".join(f"{number}) {answer};;" for number, answer in enumerate(answers, start=1))
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase $(wc -l < {calls}) in\n{cases}\nesac\n')
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr(spot, "LOOK_EVERY_S", 0.01)
    return calls


def test_ray_is_told_again_until_it_has_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ray_that(monkeypatch, tmp_path, "exit 1", "exec sleep 600", "exit 0")
    monkeypatch.setattr(spot, "TELL_S", 2.0)
    monkeypatch.setattr(spot, "watch", lambda: "terminate")
    with pytest.raises(SystemExit) as ended:
        spot.main()
    assert ended.value.code == 0
    left = [int(call.split()[-1]) for call in calls.read_text().splitlines()]
    assert len(left) == 3
    assert left[0] == spot.LEFT_S
    assert left[2] <= left[0] - 2  # what is left by then


def test_a_notice_that_ray_never_heard_ends_with_the_machines_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = ray_that(monkeypatch, tmp_path, *["exit 3"] * 1000)
    monkeypatch.setattr(spot, "LEFT_S", 1)
    assert not spot.tell("terminate")
    assert len(calls.read_text().splitlines()) > 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve, which Ray's commands import
def test_ray_takes_the_command() -> None:
    from ray.scripts.scripts import cli

    _, _, module, command, *options = spot.drain("terminate")
    assert module == "ray.scripts.scripts"
    given = cli.commands[command].make_context(command, list(options)).params
    assert (given["reason"], given["deadline_remaining_seconds"]) == ("DRAIN_NODE_REASON_PREEMPTION", 110)
    assert given["node_id"] is None  # the node that it runs on
