"""What `secateur doctor` finds of Ray, which is not started for it."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from support import free_port

from cluster import checks
from pipeline.settings.config import Config


def test_without_an_address_ray_is_started_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    [found] = checks.ray(None)
    assert (found.state, found.what) == ("ok", "Ray")
    assert "when needed" in found.found


def test_a_cluster_that_does_not_answer_is_broken(tiny: Callable[..., Config]) -> None:
    [found] = checks.ray(tiny(**{"cluster.address": f"127.0.0.1:{free_port()}"}))
    assert found.state == "broken"
    assert "ray start --head" in found.remedy
    with socket.create_server(("127.0.0.1", 0)) as server:
        [found] = checks.ray(tiny(**{"cluster.address": f"127.0.0.1:{server.getsockname()[1]}"}))
    assert found.state == "ok"
