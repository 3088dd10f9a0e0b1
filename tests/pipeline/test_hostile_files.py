"""Files from anybody: nothing in them is run, nothing outside of their folder is read, and each ends in one message."""

from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import few_samples
import numpy as np
import pytest
import torch
import webdataset as wds
from few_samples import run_in
from PIL import Image
from safetensors.torch import save

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.data import loader, shards
from pipeline.network.build import build_network
from pipeline.network.weights import load_weights
from pipeline.run.state import Run
from pipeline.settings.config import load_config, parse_config
from pipeline.settings.data import Data
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Checkpoint, Torn


class Payload:
    """What unpickling would run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """A file that must not be there at the end."""
    path = tmp_path / "MARKER"
    yield path
    assert not path.exists(), "something was run"


def network(path: Path) -> torch.nn.Module:
    return build_network(parse_config({"name": "a", "model": {"checkpoint": str(path)}}).model, 10)


def test_the_payload_is_one(tmp_path: Path) -> None:
    """What the other tests rest on."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "there")))  # noqa: S301 - our own
    assert (tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code(name: str, kind: str, tmp_path: Path, marker: Path) -> None:
    content = {"fc1.weight": torch.zeros(2), "x": Payload(marker)}
    path = tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=rf"model\.checkpoint '.*{name}' cannot be read as tensors alone"):
        network(path)


def safetensors(header: bytes, length: int | None = None, body: bytes = bytes(64)) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def described(shape: list[int], start: int, end: int) -> bytes:
    return json.dumps({"fc1.weight": {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        safetensors(b"{}", 2**63),
        safetensors(b"{}", 2**40),
        safetensors(b"["),
        safetensors(b'{"a":' * 50_000),
        safetensors(described([4, 4], 0, 2**40)),
        safetensors(described([2**40], 0, 64)),
        safetensors(described([2**62, 2**62], 0, 64)),
        safetensors(described([4, 4], 64, 0)),
        safetensors(described([16], 0, 64)),
    ],
)
def test_safetensors_with_false_lengths(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.checkpoint"):
        network(tmp_path / "a.safetensors")


def test_only_the_config_names_a_factory(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef build(): ...\n")
    monkeypatch.chdir(tmp_path)
    model = network_of_its_own(tmp_path, {"factory": "evil:build", "model.factory": "evil:build", "class": "evil"})
    assert torch.equal(model.state_dict()["fc3.bias"], torch.ones(10))
    assert "evil" not in sys.modules


def network_of_its_own(folder: Path, metadata: dict[str, str]) -> torch.nn.Module:
    plain = build_network(parse_config({"name": "a"}).model, 10)
    state = {**plain.state_dict(), "fc3.bias": torch.ones(10)}
    (folder / "a.safetensors").write_bytes(save(state, metadata))
    return network(folder / "a.safetensors")


@pytest.mark.parametrize("place", ["pipe:touch {}", "file:///etc|touch {}", "/etc|touch {}", "file:///etc;touch {}"])
def test_urls_that_are_commands(place: str, marker: Path, tmp_path: Path) -> None:
    url = place.format(marker)
    for look in (
        lambda: storage.read_bytes(url),
        lambda: shards.load_manifest(url),
        lambda: shards.index(url),
        lambda: network(Path(f"{url}.pth")) if "://" not in url else load_weights(torch.nn.Linear(1, 1), url),
        lambda: load_config(url),
        lambda: load_config(tmp_path / "none.yaml", [f"data.root={url}"]),
    ):
        with pytest.raises((UserError, FileNotFoundError)):
            look()


class _Redirecting(http.server.BaseHTTPRequestHandler):
    target = ""

    def _send(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = _send

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def redirecting() -> Iterator[Callable[[str], str]]:
    """A web server; given an address, the URL that it answers with a redirect to it."""
    handler = type("Handler", (_Redirecting,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def to(target: str) -> str:
        handler.target = target  # type: ignore[attr-defined]
        return f"http://127.0.0.1:{server.server_port}"

    yield to
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "pipe:touch MARKER", "s3://bucket/key", "ftp://host/x"])
def test_a_web_server_leads_nowhere_else(target: str, redirecting: Callable[[str], str]) -> None:
    url = redirecting(target)
    with pytest.raises(UserError, match=r"127\.0\.0\.1"):
        shards.load_manifest(url)
    with pytest.raises(UserError, match=r"127\.0\.0\.1"):
        storage.open_range(f"{url}/x.tar").read()
    assert not Path("MARKER").exists()


def test_members_that_could_be_unpickled_are_left_alone(tmp_path: Path, marker: Path) -> None:
    """WebDataset's own decoder runs .pyd and .pth; ours takes images and labels by name."""
    stream = io.BytesIO()
    Image.new("L", (8, 8), 9).save(stream, "PNG")
    code = pickle.dumps(Payload(marker))
    for part in ("train", "val", "test"):
        with wds.TarWriter(str(tmp_path / f"{part}-0.tar"), encoder=False) as writer:
            for i in range(4):
                extra = dict.fromkeys(("pyd", "pickle", "pth", "npy", "pkl", "pt"), code)
                writer.write({"__key__": f"k{i}", "png": stream.getvalue(), "cls": b"1", **extra})
    described, _ = shards.index(str(tmp_path))
    assert shards.verify(str(tmp_path)) == []
    config = parse_config({"name": "a", "data": {"source": "shards", "root": str(tmp_path), "size": 8}}).data
    split = loader.open_split(config, str(tmp_path), described, "train")
    assert [raw.data for raw in split.read(np.arange(4))] == [stream.getvalue()] * 4
    with pytest.raises(UserError, match=r"no \.json member"):
        shards.index(str(tmp_path), label="pyd")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return run_in(tmp_path / "run")


Tree = dict[str, Any]


@pytest.mark.parametrize(
    "harm",
    [
        lambda tree: tree["files"].pop("state.json"),
        lambda tree: tree.update(files=[]),
        lambda tree: tree.pop("files"),
        lambda tree: tree.update(masked={"w": [10**9, 10**9]}),
        lambda tree: tree.update(masked={"w": "x"}),
        lambda tree: tree.update(masked={"w": [-8]}),
        lambda tree: tree["files"]["masks.bin"].update(bytes=10**18),
        lambda tree: tree["files"].update({"masks.bin": None}),
    ],
)
def test_a_checkpoint_whose_manifest_lies_is_torn(harm: Callable[[Tree], Any], run: Run, tmp_path: Path) -> None:
    checkpoint.save(run, "x", Checkpoint({"w": torch.ones(8)}, {"w": torch.ones(8, dtype=torch.bool)}))
    path = tmp_path / "run/x/manifest.json"
    tree = json.loads(path.read_text())
    harm(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises((Torn, UserError)):
        checkpoint.load(run, "x")


@pytest.mark.timeout(60)
def test_a_checkpoint_reads_its_own_files_alone(run: Run, tmp_path: Path) -> None:
    """A name in its manifest that leads elsewhere is not followed: there is a pipe there, which would never end."""
    checkpoint.save(run, "x", Checkpoint({"w": torch.ones(8)}))
    os.mkfifo(tmp_path / "outside")
    path = tmp_path / "run/x/manifest.json"
    tree = json.loads(path.read_text())
    for name in ("../../outside", str(tmp_path / "outside"), "../x/../../outside"):
        tree["files"][name] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(tree))
    assert checkpoint.load(run, "x").weights.keys() == {"w"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A good one of version 1, all of which is JSON, as text."""
    return json.dumps(few_samples.version_1(shards.build(Data(), 0, str(tmp_path_factory.mktemp("shards")))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "../../etc/passwd"),
        ("name", "/etc/passwd"),
        ("name", "..\\x.tar"),
        ("name", ""),
        ("name", "x\0.tar"),
        ("name", "test-00000.tar"),
        ("bytes", 10**400),
        ("bytes", -1),
        ("labels", [10**30]),
        ("offsets", [-512]),
        ("crc32", [1, 2, 3]),
    ],
)
def test_a_manifest_that_leads_out_or_lies(key: str, value: Any, manifest: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    tree = json.loads(manifest)
    shard = tree["splits"]["train"][0]
    shard[key] = value + shard[key][len(value) :] if isinstance(value, list) and key != "crc32" else value
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"manifest\.json' is (damaged|not valid JSON)"):
        shards.load_manifest(str(tmp_path))
