"""An object written as a stream: in one request if it is small, else in parts that appear together at the end."""

from __future__ import annotations

import io
import uuid
from typing import Any

from pipeline.data.storage import retry, s3


class Upload(io.RawIOBase):
    """Collects what is written and sends each part as it is full."""

    def __init__(self, url: str, metadata: dict[str, str]) -> None:
        self._url, self._metadata = url, metadata
        self._bucket, self._key = s3.place(url)
        self._waiting = bytearray()
        self._id: str | None = None
        self._parts: list[dict[str, Any]] = []
        # Known again on the object if the answer to its completion is lost.
        self._mark = uuid.uuid4().hex

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._waiting += view
        while len(self._waiting) >= s3.PART:
            part = bytes(self._waiting[: s3.PART])
            del self._waiting[: s3.PART]
            self._send(part)
        return len(view)

    def finish(self) -> None:
        """Make the object appear."""
        if self._id is None:
            s3.put(self._url, bytes(self._waiting), Metadata=self._metadata)
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
            s3.abort_upload(self._url, self._id)
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
            return getattr(s3.client(), operation)(Bucket=self._bucket, Key=self._key, **options)

        return retry.call(self._url, s3.judge, s3.ERRORS, send)
