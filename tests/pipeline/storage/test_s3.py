"""Storage on S3, against moto's server, and through a proxy that makes faults."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import numpy as np
import pytest
from botocore.exceptions import ClientError
from faults.proxy import Fault, Proxy

from pipeline import storage
from pipeline.base.errors import UserError
from pipeline.storage import s3 as boto

BIG = np.random.default_rng(0).integers(0, 256, 17 * 2**20, np.uint8).tobytes()  # two ranges, two parts


@pytest.fixture
def proxy(s3: str, moto: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What is on `s3`, reached through a proxy from here on."""
    made = Proxy(moto)
    boto.client().put_object(Bucket=s3.removeprefix("s3://"), Key="big", Body=BIG)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    monkeypatch.setenv("SECATEUR_STORAGE_TIMEOUT_S", "2")
    boto.client.cache_clear()
    yield made
    made.close()


def retried(before: int) -> int:
    return sum(storage.retries().values()) - before


def unfinished(bucket: str) -> list[str]:
    found = boto.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))
    return [upload["Key"] for upload in found.get("Uploads", ())]


def test_it_does_what_it_does_on_a_disk(s3: str) -> None:
    url = f"{s3}/deep/a b+ü.bin"
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.size(url) == 10
    assert storage.exists(url)
    assert not storage.exists(f"{s3}/deep")
    assert storage.sha256(url) == hashlib.sha256(b"0123456789").hexdigest()
    for start, stop in ((0, None), (3, 7), (3, 3), (8, 20), (10, None), (12, 14)):
        with storage.open_range(url, start, stop) as stream:
            assert stream.read() == b"0123456789"[start:stop]
    storage.write_bytes(f"{s3}/empty", b"")
    assert storage.read_bytes(f"{s3}/empty") == b""
    storage.write_json(f"{s3}/deep/v.json", {"a": [1, 2]})
    assert storage.read_json(f"{s3}/deep/v.json") == {"a": [1, 2]}
    storage.write_bytes(f"{s3}/deep/.hidden", b"")
    storage.write_bytes(f"{s3}/deep/er/x", b"")
    assert storage.list_files(f"{s3}/deep/") == ["a b+ü.bin", "v.json"]
    assert storage.list_folders(f"{s3}/deep") == ["er"]
    assert storage.list_folders(s3) == ["deep"]
    assert storage.list_files(f"{s3}/none") == []
    with storage.atomic_path(f"{s3}/made/by.path") as path:
        path.write_bytes(b"local")
    assert storage.read_bytes(f"{s3}/made/by.path") == b"local"
    with storage.local_copy(f"{s3}/made/by.path") as copy:
        assert (copy.name, copy.read_bytes()) == ("by.path", b"local")
    assert not copy.exists()
    storage.remove(f"{s3}/empty")
    storage.remove(f"{s3}/empty")
    storage.remove_tree(f"{s3}/deep")
    assert storage.list_folders(s3) == ["made"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(url)
    with pytest.raises(FileNotFoundError):
        storage.size(url)


def test_a_listing_of_many_pages_is_whole(s3: str) -> None:
    names = [f"{number:04d}" for number in range(25)]
    for name in names:
        boto.client().put_object(Bucket=s3.removeprefix("s3://"), Key=f"many/{name}", Body=b"")
    assert storage.list_files(f"{s3}/many") == names
    storage.remove_tree(f"{s3}/many")
    assert storage.list_files(f"{s3}/many") == []


@pytest.mark.parametrize("code", ["InternalError", "SlowDown"])
def test_a_store_too_busy_to_delete_an_object_is_asked_again(proxy: Proxy, s3: str, code: str) -> None:
    """It says so within an answer that is otherwise good."""
    before = storage.retries()
    proxy.fault = Fault("keep", times=2, method="POST", code=code)
    storage.remove_tree(s3)
    assert storage.list_files(s3) == []
    assert (storage.retries() - before)[code] == 2


def test_an_object_that_may_not_be_deleted_is_one_message(proxy: Proxy, s3: str) -> None:
    proxy.fault = Fault("keep", times=-1, method="POST", code="AccessDenied")
    with pytest.raises(UserError, match=r"'s3://test-\w+/a' cannot be deleted \(AccessDenied\): allow it"):
        storage.remove_tree(s3)
    assert proxy.made == 1


def test_a_large_file_goes_up_in_parts_and_appears_at_the_end(s3: str) -> None:
    url = f"{s3}/big"
    with storage.create(url, "noted") as stream:
        for start in range(0, len(BIG), 2**20):
            stream.write(BIG[start : start + 2**20])
        assert not storage.exists(url)
    assert storage.read_bytes(url) == BIG
    assert storage.stat(url).sha256 == "noted"  # type: ignore[union-attr]


def test_an_upload_that_fails_leaves_nothing(s3: str) -> None:
    def killed() -> None:
        with storage.create(f"{s3}/half") as stream:
            stream.write(BIG)
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        killed()
    assert not storage.exists(f"{s3}/half")
    assert unfinished(s3) == []


def test_what_a_killed_upload_left_is_removed(s3: str) -> None:
    bucket = s3.removeprefix("s3://")
    for key in ("run/deep/x", "run/y", "other/z"):
        boto.client().create_multipart_upload(Bucket=bucket, Key=key)
    storage.remove_leftovers(f"{s3}/run")
    assert unfinished(s3) == ["other/z"]


def test_a_conditional_write_is_taken_once(s3: str) -> None:
    url = f"{s3}/lease"
    first = storage.put_if(url, b"a", None)
    assert first is not None
    assert storage.put_if(url, b"b", None) is None
    second = storage.put_if(url, b"c", first)
    assert second not in (None, first)
    assert storage.put_if(url, b"d", first) is None
    found = storage.read_versioned(url)
    assert found is not None
    assert (found.data, found.version) == (b"c", second)
    assert 0 <= found.age_s < 10


def test_a_conditional_write_whose_answer_is_lost_is_known_as_ours(proxy: Proxy, s3: str) -> None:
    proxy.fault = Fault("forget", method="PUT")
    version = storage.put_if(f"{s3}/lease", b"mine", None)
    assert version == storage.read_versioned(f"{s3}/lease").version  # type: ignore[union-attr]
    assert proxy.made == 1


def test_a_completion_whose_answer_is_lost_is_known_as_ours(proxy: Proxy, s3: str) -> None:
    with storage.create(f"{s3}/big") as stream:
        stream.write(BIG)
        proxy.fault = Fault("forget", method="POST", path="uploadId")
    assert storage.sha256(f"{s3}/big") == hashlib.sha256(BIG).hexdigest()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("refuse", times=3), "SlowDown"),
        (Fault("reset", times=2, after=3_000_000), "ResponseStreamingError"),
        (Fault("cut", times=2, after=3_000_000), "ResponseStreamingError"),
        (Fault("stall", times=1, after=5_000_000), "ReadTimeoutError"),
        (Fault("forget", times=1), "ConnectionClosedError"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_stream_goes_on_from_where_a_fault_left_it(proxy: Proxy, s3: str, fault: Fault, reason: str) -> None:
    wanted, before = fault.times, sum(storage.retries().values())
    proxy.fault, proxy.requests = fault, []
    with storage.open_range(f"{s3}/big") as stream:
        assert stream.read() == BIG
    assert retried(before) == proxy.made == wanted
    assert storage.retries()[reason] >= wanted
    starts = [int(header.removeprefix("bytes=").partition("-")[0]) for *_, header in proxy.requests]
    assert len(starts) == 2 + wanted
    assert starts == sorted(starts)
    if fault.kind in ("cut", "stall"):  # at most the piece in flight is asked for again
        assert fault.after - 2**18 <= starts[1] <= fault.after


def test_a_slow_link_is_no_fault(proxy: Proxy, s3: str) -> None:
    storage.write_bytes(f"{s3}/x", BIG[:100_000])
    before = sum(storage.retries().values())
    proxy.fault = Fault("slow", rate=40_000)
    started = time.monotonic()
    assert storage.read_bytes(f"{s3}/x") == BIG[:100_000]
    assert time.monotonic() - started > 2.0  # longer in all than the timeout
    assert retried(before) == 0


@pytest.mark.parametrize("kind", ["refuse", "reset", "cut", "stall"])
def test_beyond_the_bound_it_is_one_message(proxy: Proxy, s3: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/x", BIG[:100_000])
    monkeypatch.setenv("SECATEUR_STORAGE_RETRIES", "2")
    monkeypatch.setenv("SECATEUR_STORAGE_TIMEOUT_S", "0.5")
    boto.client.cache_clear()
    proxy.fault = Fault(kind, times=-1)
    with pytest.raises(UserError, match=rf"'{s3}/x' did not answer in 3 tries, .*same command again"):
        storage.read_bytes(f"{s3}/x")
    assert proxy.made == 3


def test_writes_and_listings_are_tried_again(proxy: Proxy, s3: str) -> None:
    for method, act in (
        ("PUT", lambda: storage.write_bytes(f"{s3}/d/x", b"x")),
        ("HEAD", lambda: storage.stat(f"{s3}/d/x")),
        ("GET", lambda: storage.list_files(f"{s3}/d")),
        ("DELETE", lambda: storage.remove(f"{s3}/d/x")),
    ):
        before = sum(storage.retries().values())
        proxy.fault = Fault("refuse", times=2, method=method)
        act()
        assert retried(before) == 2, method


def test_an_object_that_changes_while_it_is_read_is_an_error(s3: str) -> None:
    storage.write_bytes(f"{s3}/big", BIG)
    with storage.open_range(f"{s3}/big") as stream:
        stream.read(100)
        storage.write_bytes(f"{s3}/big", bytes(reversed(BIG)))
        with pytest.raises(UserError, match=rf"'{s3}/big' was changed while it was in use"):
            stream.read()
    version = storage.stat(f"{s3}/big").version  # type: ignore[union-attr]
    storage.write_bytes(f"{s3}/big", b"new")
    with pytest.raises(UserError, match="was changed"):
        storage.open_range(f"{s3}/big", 0, None, version)


def test_each_mistake_is_one_message(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no bucket 'not-there'.*AWS_ENDPOINT_URL"):
        storage.write_bytes("s3://not-there/x", b"")
    with pytest.raises(UserError, match="there is no bucket 'not-there'"):
        storage.read_bytes("s3://not-there/x")
    with pytest.raises(UserError, match="names no bucket"):
        storage.read_bytes("s3:///x")
    with pytest.raises(UserError, match="holds a secret") as told:
        storage.read_bytes("s3://KEY:hush@bucket/x")
    assert "hush" not in str(told.value)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(boto, "_served", False)  # at the start of a process
    boto.client.cache_clear()
    with pytest.raises(UserError, match=r"no credentials for S3.*AWS_PROFILE"):
        storage.read_bytes(f"{s3}/x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    boto.client.cache_clear()
    for act in (storage.read_bytes, storage.list_files, storage.remove_tree):
        with pytest.raises(UserError, match=r"no credentials for S3.*nobody"):
            act(f"{s3}/x")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    boto.client.cache_clear()
    with pytest.raises(UserError, match=r"AWS_ENDPOINT_URL.*no address"):
        storage.read_bytes(f"{s3}/x")


def test_an_endpoint_where_nothing_listens_is_one_message(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    boto.client.cache_clear()
    monkeypatch.setattr(boto, "_reached", False)
    with pytest.raises(UserError, match=r"did not answer in 5 tries.*EndpointConnectionError.*AWS_ENDPOINT_URL"):
        storage.read_bytes(f"{s3}/x")


def test_http_is_read_and_not_written(proxy: Proxy, s3: str) -> None:
    client, bucket = boto.client(), s3.removeprefix("s3://")
    client.put_object_acl(Bucket=bucket, Key="big", ACL="public-read")
    url = f"{proxy.url}/{bucket}/big"
    proxy.fault = Fault("reset", times=2, after=3_000_000)
    assert storage.read_bytes(url) == BIG
    assert proxy.made == 2
    assert storage.size(url) == len(BIG)
    assert not storage.exists(f"{proxy.url}/{bucket}/none")
    with pytest.raises(UserError, match="can only be read"):
        storage.write_bytes(url, b"")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("AccessDenied", r"denies access \(PutObject\): allow s3:GetObject.*bucket 'b'"),
        ("ExpiredToken", r"does not accept the credentials \(ExpiredToken\): renew"),
        ("PermanentRedirect", r"another region.*AWS_REGION"),
        ("RequestTimeTooSkewed", r"clock is wrong"),
        ("NotImplemented", r"conditional writes"),
        ("EntityTooLarge", r"refuses PutObject"),
    ],
)
def test_what_s3_refuses_is_told_with_its_remedy(code: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boto, "_served", False)
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "PutObject")
    with pytest.raises(UserError, match=words):
        boto.judge("s3://b/x", error)
