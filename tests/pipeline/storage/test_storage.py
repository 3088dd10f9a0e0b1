"""Reads, ranges and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import os

import pytest

from pipeline import storage
from pipeline.base.errors import UserError


def test_bytes_json_and_ranges(tmp_path):
    url = f"file://{tmp_path}/deep/a%20b.bin"
    storage.write_bytes(url, b"0123456789")
    assert (tmp_path / "deep" / "a b.bin").read_bytes() == b"0123456789"
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.size(url) == 10
    assert storage.exists(url)
    assert not storage.exists(tmp_path)
    assert storage.sha256(url) == hashlib.sha256(b"0123456789").hexdigest()
    for start, stop in ((0, None), (3, 7), (3, 3), (8, 20)):
        with storage.open_range(url, start, stop) as stream:
            assert stream.read() == b"0123456789"[start:stop]
    with storage.open_range(url, 2, 9) as stream:
        assert [stream.read(4), stream.read(4), stream.read(4)] == [b"2345", b"678", b""]
    storage.write_json(tmp_path / "v.json", {"a": [1, 2]})
    assert storage.read_json(tmp_path / "v.json") == {"a": [1, 2]}
    assert storage.list_files(tmp_path) == ["v.json"]
    assert storage.list_files(tmp_path / "none") == []


def test_join():
    assert storage.join("/a/", "b", "/c") == "/a/b/c"
    assert storage.join("file:///a", "b") == "file:///a/b"
    assert storage.join("/", "b") == "/b"


@pytest.mark.parametrize("url", ["pipe:cat x", "gs://bucket/key", "ftp://x/y", "file://host/x"])
def test_other_schemes_are_refused(url):
    with pytest.raises(UserError, match=r"path|shell|host"):
        storage.read_bytes(url)


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json"):
        storage.read_json(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    storage.write_bytes(tmp_path / "x", b"old")

    def killed():
        with storage.create(tmp_path / "x") as stream:
            stream.write(b"half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match=r"killed"):
        killed()
    assert storage.read_bytes(tmp_path / "x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_full_disk_names_path_and_remedy(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x\.bin.*free space.*same command again"):
        storage.write_bytes(tmp_path / "x.bin", b"data")
    assert os.listdir(tmp_path) == []
