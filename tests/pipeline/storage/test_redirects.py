"""Redirects of a web server: never to less than https, nor into the places of this machine and its network."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from web_server import Quiet, serving

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.storage import redirects


def test_a_redirect_never_leads_to_a_link_local_address(monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda s, to: (connected.append(to), connect(s, to))[1])
    places = ["169.254.169.254", "2852039166", "[::ffff:169.254.169.254]", "[fe80::1]"]

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.send_response(307)
            self.send_header("Location", f"http://{places[0]}/latest/meta-data")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    with serving(Handler) as url:
        while places:
            for look in (storage.read_bytes, storage.exists):
                with pytest.raises(UserError, match=r"'http://127\.0\.0\.1.* redirects to .*a link-local address"):
                    look(f"{url}/manifest.json")
            del places[0]
        assert {to[0] for to in connected} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("https://8.8.8.8/x", "http://8.8.8.8/x", "not encrypted"),
        ("https://8.8.8.8/x", "https://127.0.0.1/x", "your own network"),
        ("http://8.8.8.8/x", "http://10.0.0.1/x", "your own network"),
        ("http://8.8.8.8/x", "//[::1]:80/x", "your own network"),
        ("http://8.8.8.8/x", "http://0/x", "your own network"),
        ("http://8.8.8.8/x", "http://ann@8.8.4.4/x", "user name"),
        ("http://8.8.8.8/x", "file:///etc/passwd", "not on a web server"),
        ("http://8.8.8.8/x", "http://[/x", "no address"),
    ],
)
def test_redirects_that_are_not_followed(source: str, target: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        redirects.follow(source, target)


def test_redirects_that_are_followed() -> None:
    assert redirects.follow("http://8.8.8.8/a/x", "https://8.8.4.4/y") == "https://8.8.4.4/y"
    assert redirects.follow("http://10.0.0.1/a/x", "z") == "http://10.0.0.1/a/z"
    assert redirects.follow("http://127.0.0.1:80/a", "http://10.0.0.1/") == "http://10.0.0.1/"
