"""A proxy between a program and a store, which makes faults on demand: one rule, for the next so many requests."""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_PIECE = 2**12


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` (any, if empty) whose path holds `path`.

    refuse: answered with `status` and S3's `code`. keep: not carried out, and answered as a request to delete many
    objects that has failed with `code` for one of them. strip: carried out without its If-Match and If-None-Match.
    hang: silence. delay: carried out `seconds` later. forget: carried out, and the connection reset instead of an
    answer. Within the body, after `after` bytes: reset, cut (closed as if it were whole) or stall (silence). slow:
    `rate` bytes a second.
    """

    kind: str
    times: int = 1
    after: int = 0
    rate: int = 0
    method: str = "GET"
    path: str = ""
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.0


class Proxy:
    """Listens on a free port of this machine and hands requests on to `upstream`."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.fault: Fault | None = None
        self.made = 0  # faults so far
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range header
        self.carried_out: list[tuple[str, str]] = []  # method and path of those that the store did not refuse
        self.released = threading.Event()  # ends connections that stall
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def due(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            fault = self.fault
            if fault is None or fault.times == 0 or fault.method not in ("", method) or fault.path not in path:
                return None
            fault.times -= 1
            self.made += 1
            return fault

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # the client, or a fault, has ended the connection
            super().handle()

    def _relay(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.requests.append((self.command, self.path, self.headers.get("Range", "")))
        fault = self.proxy.due(self.command, self.path)
        if fault is not None and fault.kind in ("refuse", "keep"):
            error = f"<Error><Key>a</Key><Code>{fault.code}</Code><Message>A fault.</Message></Error>".encode()
            if fault.kind == "keep":
                error = b"<DeleteResult>" + error + b"</DeleteResult>"
            self.send_response(200 if fault.kind == "keep" else fault.status)
            self.send_header("Content-Length", str(len(error)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(error)
            return
        if fault is not None and fault.kind == "hang":
            self.proxy.released.wait(600)
            self._end(reset=True)
        if fault is not None and fault.kind == "delay":
            time.sleep(fault.seconds)
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        dropped = {"expect", *(("if-match", "if-none-match") if fault is not None and fault.kind == "strip" else ())}
        headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if answer.status < 400:
            self.proxy.carried_out.append((self.command, self.path))
        if fault is not None and fault.kind == "forget":
            self._end(reset=True)
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        for piece in _pieces(content):
            self._send(piece, fault)

    def _send(self, piece: tuple[int, bytes], fault: Fault | None) -> None:
        start, data = piece
        if fault is None:
            self.wfile.write(data)
        elif fault.kind == "slow":
            time.sleep(len(data) / fault.rate)
            self.wfile.write(data)
        elif fault.kind in ("delay", "strip") or start + len(data) <= fault.after:
            self.wfile.write(data)
        else:
            self.wfile.write(data[: max(0, fault.after - start)])
            if fault.kind == "stall":
                self.proxy.released.wait(60)
            self._end(reset=fault.kind == "reset")

    def _end(self, reset: bool) -> None:
        """End the connection: by RST, or by an orderly FIN in the middle."""
        self.wfile.flush()
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        raise ConnectionResetError("a fault")

    do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = _relay


def _pieces(content: bytes) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(content), _PIECE):
        yield start, content[start : start + _PIECE]
