"""Locks on files: the kernel holds one for a process, and frees it when the process dies."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.base.errors import UserError
from pipeline.storage.local import room


class LockedByAnother(Exception):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, setting: str, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a file while the block lasts.

    Raises LockedByAnother where another process has it and `wait` is false. Raises UserError, which names `setting`,
    where the file system has no locks (NFS without its lock service, Lustre mounted without flock) or fails. Raises
    DiskFull where the lock's file does not fit.
    """
    # A soft lock would outlive a killed process. Any thread may end the block.
    lock = FileLock(path, blocking=wait, thread_local=False, fallback_to_soft=False)
    try:
        with room(path):
            lock.acquire()
    except Timeout as error:  # an OSError itself
        raise LockedByAnother(str(path)) from error
    except OSError as error:
        raise UserError(
            f"{setting}: '{path}' cannot be used as a lock ({error.strerror}): allow writing there and see that the "
            "file system has locks (NFS its lock service, Lustre the mount option flock), or name a folder on another"
        ) from error
    try:
        yield
    finally:
        try:
            lock.release()
        except OSError as error:  # it ends with this process
            warnings.warn(f"{setting}: the lock '{path}' could not be given back: {error.strerror}", stacklevel=2)
