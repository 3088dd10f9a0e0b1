"""Objects on S3 and compatible stores, through boto3. Endpoint, credentials and region come from the usual AWS chain.

boto3's own retries are off. Our own retries are for named errors, and are counted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, TypeVar, cast

import boto3
import botocore.config
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from pipeline.base.errors import UserError
from pipeline.storage import meanings, retry
from pipeline.storage.meanings import Changed, meaning
from pipeline.storage.ranges import Body, RangeStream
from pipeline.storage.retry import Check, Passing
from pipeline.storage.stat import Stat, Versioned

R = TypeVar("R")
PART = 16 * 2**20  # bytes of a part of an upload
Fields = dict[str, Any]  # what S3 takes and answers
_WHOLE = 64 * 2**20  # a file up to this size is one PUT
_BUFFER = 2**20
_UNREACHED_TRIES = 4  # where the store has never answered this process, its address is more likely to be wrong
_NO_CREDENTIALS_TRIES = 3  # where none were ever found, there are more likely none
# botocore tells of credentials that are still expired after a refresh by a RuntimeError.
ERRORS = (boto.ClientError, boto.BotoCoreError, ResponseParserError, HTTPError, RuntimeError)
_reached = False  # whether the store has ever answered this process
_served = False  # whether it has done what this process asked, so that the credentials were good


@functools.cache
def client() -> Any:
    """This process's connection to the store (safe for threads)."""
    # botocore reads AWS_DEFAULT_REGION and the profile, but not AWS_REGION, which AWS sets in its own services.
    settings = botocore.config.Config(
        connect_timeout=min(10.0, retry.timeout_s()),
        read_timeout=retry.timeout_s(),
        retries={"total_max_attempts": 1},
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    try:
        return boto3.session.Session().client("s3", region_name=os.environ.get("AWS_REGION"), config=settings)
    except ValueError as error:
        raise UserError(f"AWS_ENDPOINT_URL (or AWS_REGION) cannot be used ({error}): write http(s)://host") from error


def place(url: str) -> tuple[str, str]:
    """Bucket and key. Raises UserError where the URL has no bucket, or a password."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise UserError(
            f"'s3://...@{bucket.rpartition('@')[2]}' holds a secret: give it by the AWS chain (a profile, a role or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), never in a URL"
        )
    if not bucket:
        raise UserError(f"'{url}' names no bucket: write s3://bucket/key")
    return bucket, key


def judge(url: str, error: Exception) -> Passing:
    """Whether an error is transient. For a permanent one, raises what it means.

    Failing credentials are transient once they have worked: whoever renews them may be late. Before, none at all are
    looked for a few times more: a new process must not end by one slow answer of the machine's metadata service.
    """
    global _reached
    if isinstance(error, RuntimeError) and not meanings.of_credentials(error):
        raise error  # our mistake
    refused = isinstance(error, boto.ClientError)
    _reached = _reached or refused
    reason = meanings.code_of(error) if refused else type(error).__name__
    if meanings.passes(error):
        return Passing(reason, retry.tries() if _reached else min(_UNREACHED_TRIES, retry.tries()))
    if _served and meanings.of_credentials(error):
        client.cache_clear()  # the next try asks the whole AWS chain again
        return Passing(
            reason, retry.tries(), "had no good credentials", f"see why they are not renewed ({meanings.CHAIN})"
        )
    if not refused and meanings.of_credentials(error):
        client.cache_clear()  # one that found none has none for good
        return Passing(reason, min(_NO_CREDENTIALS_TRIES, retry.tries()), otherwise=meaning(url, error))
    raise meaning(url, error) from error


def _call(
    url: str, function: Callable[[], R], check: Check | None = None, longest_wait_s: float = retry.LONGEST_WAIT_S
) -> R:
    global _reached, _served
    result = retry.call(url, judge, ERRORS, function, check, longest_wait_s)
    _reached = _served = True
    return result


def stat(url: str) -> Stat | None:
    """Size and ETag of an object, or None where there is none."""
    bucket, key = place(url)
    try:
        found = _call(url, lambda: client().head_object(Bucket=bucket, Key=key))
    except FileNotFoundError:
        return None
    return Stat(int(found["ContentLength"]), str(found["ETag"]), found.get("Metadata", {}).get("sha256"))


def read_versioned(url: str) -> Versioned:
    """A small object at once. Raises FileNotFoundError."""
    bucket, key = place(url)

    def get() -> Versioned:
        found = client().get_object(Bucket=bucket, Key=key)
        with contextlib.closing(found["Body"]) as body:
            data = body.read()
        now = found["ResponseMetadata"]["HTTPHeaders"].get("date")
        age = (parsedate_to_datetime(now).timestamp() - found["LastModified"].timestamp()) if now else 0.0
        return Versioned(data, str(found["ETag"]), max(0.0, age))

    return _call(url, get)


def read(url: str) -> bytes:
    """A whole object. Raises FileNotFoundError."""
    with open_range(url, 0, None, None) as stream:
        return stream.read()


def put(
    url: str, data: bytes, check: Check | None = None, longest_wait_s: float = retry.LONGEST_WAIT_S, **options: Any
) -> str:
    """Write an object in one request; returns its version."""
    bucket, key = place(url)

    def send() -> Any:
        return client().put_object(Bucket=bucket, Key=key, Body=data, **options)

    return str(_call(url, send, check, longest_wait_s)["ETag"])


def put_if(
    url: str, data: bytes, version: str | None, check: Check | None = None,
    longest_wait_s: float = retry.LONGEST_WAIT_S,
) -> str | None:  # fmt: skip
    """Write an object if it still has that version (None: if there is none); its new version, or None if it has not.

    `data` must differ from all other writers' data: after a lost answer, it shows whether the write succeeded.
    """
    condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    try:
        return put(url, data, check, longest_wait_s, **condition)
    except (Changed, FileNotFoundError):
        pass
    try:
        found = read_versioned(url)
    except FileNotFoundError:
        return None
    return found.version if found.data == data else None


def ignored_conditions(folder: str) -> list[str]:
    """Which conditions of a write the store does not heed: 4 requests find out, with an object that is then deleted."""
    url = f"{folder.rstrip('/')}/.probe-{uuid.uuid4().hex}"
    put(url, b"")
    conditions: dict[str, Fields] = {"If-None-Match": {"IfNoneMatch": "*"}, "If-Match": {"IfMatch": f'"{"0" * 32}"'}}
    ignored = []
    for name, condition in conditions.items():
        with contextlib.suppress(Changed, FileNotFoundError):
            put(url, b"", **condition)
            ignored.append(name)
    remove(url)
    return ignored


def write(url: str, data: bytes, check: Check | None = None) -> None:
    """Write a whole object; a large one in parts, which appear together."""
    if len(data) <= _WHOLE:
        put(url, data, check)
        return
    with create(url, None, check) as stream:
        stream.write(data)


@contextlib.contextmanager
def create(url: str, sha256: str | None = None, check: Check | None = None) -> Iterator[BinaryIO]:
    """A stream to a new object, which appears when the block ends well; what was sent is removed where it does not."""
    upload = Upload(url, {} if sha256 is None else {"sha256": sha256}, check)
    try:
        yield cast(BinaryIO, upload)
        upload.finish()
    except BaseException:
        upload.abort()
        raise


class Upload(io.RawIOBase):
    """An object written as a stream: in one request if it is small, else in parts that appear together at the end."""

    def __init__(self, url: str, metadata: dict[str, str], check: Check | None = None) -> None:
        self._url, self._metadata, self._check = url, metadata, check
        self._bucket, self._key = place(url)
        self._waiting = bytearray()
        self._id: str | None = None
        self._parts: list[Fields] = []
        # Known again on the object if the answer to its completion is lost.
        self._mark = uuid.uuid4().hex

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._waiting += view
        while len(self._waiting) >= PART:
            part = bytes(self._waiting[:PART])
            del self._waiting[:PART]
            self._send(part)
        return len(view)

    def finish(self) -> None:
        """Make the object appear."""
        if self._id is None:
            put(self._url, bytes(self._waiting), self._check, Metadata=self._metadata)
            return
        if self._waiting:
            self._send(bytes(self._waiting))
        upload, parts = self._id, {"Parts": self._parts}
        try:
            self._call("complete_multipart_upload", UploadId=upload, MultipartUpload=parts)
        except FileNotFoundError:  # no such upload: an earlier try completed it, or somebody has aborted it
            found = self._call("head_object")
            if found.get("Metadata", {}).get("upload") != self._mark:
                raise
        self._id = None

    def abort(self) -> None:
        """Remove what was sent."""
        if self._id is not None:
            abort_upload(self._url, self._id)
            self._id = None

    def _send(self, part: bytes) -> None:
        if self._id is None:
            made = self._call("create_multipart_upload", Metadata={**self._metadata, "upload": self._mark})
            self._id = str(made["UploadId"])
        number = len(self._parts) + 1
        sent = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=part)
        checksums = {name: sent[name] for name in ("ChecksumCRC32", "ChecksumCRC64NVME") if name in sent}
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"], **checksums})

    def _call(self, operation: str, **options: Any) -> Any:
        def send() -> Any:
            return getattr(client(), operation)(Bucket=self._bucket, Key=self._key, **options)

        return _call(self._url, send, self._check)


def open_range(url: str, start: int, stop: int | None, version: str | None) -> BinaryIO:
    """A stream of bytes `start`..`stop`. Raises FileNotFoundError."""
    bucket, key = place(url)

    def fetch(first: int, last: int, known: str | None) -> Body | None:
        global _reached, _served
        condition = {} if known is None else {"IfMatch": known}
        try:
            found = client().get_object(Bucket=bucket, Key=key, Range=f"bytes={first}-{last - 1}", **condition)
        except boto.ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidRange":  # the object ends before
                return None
            raise
        _reached = _served = True
        return Body(found["Body"], str(found["ETag"]), int(found["ContentRange"].rpartition("/")[2]))

    return cast(BinaryIO, io.BufferedReader(RangeStream(url, fetch, judge, ERRORS, start, stop, version), _BUFFER))


def stats(folder: str) -> dict[str, Stat]:
    """Size and ETag of each object directly in a folder."""
    prefix = _prefix(folder)
    found: dict[str, Stat] = {}
    for page in _pages(folder, "list_objects_v2", Prefix=prefix, Delimiter="/"):
        for item in page.get("Contents", ()):
            if name := item["Key"].removeprefix(prefix):
                found[name] = Stat(int(item["Size"]), str(item["ETag"]))
    return found


def folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder."""
    prefix = _prefix(folder)
    pages = _pages(folder, "list_objects_v2", Prefix=prefix, Delimiter="/")
    return [
        item["Prefix"].removeprefix(prefix).rstrip("/") for page in pages for item in page.get("CommonPrefixes", ())
    ]


def remove(url: str, check: Check | None = None) -> None:
    """Delete an object; nothing happens if it is not there."""
    bucket, key = place(url)
    _call(url, lambda: client().delete_object(Bucket=bucket, Key=key), check)


def remove_tree(folder: str, check: Check | None = None) -> None:
    """Delete every object below a folder."""
    bucket, _ = place(folder)
    for page in _pages(folder, "list_objects_v2", Prefix=_prefix(folder)):
        keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
        if keys:
            orders = {"Objects": keys, "Quiet": True}
            kept = _call(folder, functools.partial(_delete, bucket, orders), check)
            if kept:
                raise UserError(f"'s3://{bucket}/{kept[0]['Key']}' cannot be deleted ({kept[0]['Code']}): allow it")


def _delete(bucket: str, orders: Fields) -> list[Fields]:
    """Delete objects; returns those that the store refuses to delete. Raises ClientError where it is only busy.

    The request itself succeeds all the same, so nobody else looks at the errors of single objects.
    """
    failed = client().delete_objects(Bucket=bucket, Delete=orders).get("Errors", [])
    errors = [boto.ClientError({"Error": each}, "DeleteObjects") for each in failed]
    kept = [each for each, error in zip(failed, errors, strict=True) if not meanings.passes(error)]
    if errors and not kept:
        raise errors[0]
    return kept


def remove_leftovers(folder: str) -> None:
    """End the uploads that a killed writer left unfinished below a folder; their parts would be kept, and paid for."""
    bucket, _ = place(folder)
    for page in _pages(folder, "list_multipart_uploads", Prefix=_prefix(folder)):
        for item in page.get("Uploads", ()):
            abort_upload(f"s3://{bucket}/{item['Key']}", item["UploadId"])


def abort_upload(url: str, upload: str) -> None:
    """End an unfinished upload; nothing happens if it has ended."""
    bucket, key = place(url)
    with contextlib.suppress(FileNotFoundError):
        _call(url, lambda: client().abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload))


def _prefix(folder: str) -> str:
    key = place(folder)[1].rstrip("/")
    return f"{key}/" if key else ""


def _pages(folder: str, operation: str, **options: Any) -> Iterator[Fields]:
    """The pages of a listing. boto3's paginator ends where a page fails, as if that were all."""
    bucket, _ = place(folder)

    def ask(**following: str) -> Fields:
        return dict(getattr(client(), operation)(Bucket=bucket, **options, **following))

    page = _call(folder, ask)
    yield page
    while page.get("IsTruncated"):
        if operation == "list_objects_v2":
            following = {"ContinuationToken": page["NextContinuationToken"]}
        else:
            following = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        page = _call(folder, functools.partial(ask, **following))
        yield page
