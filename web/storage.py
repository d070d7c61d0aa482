"""The temporary files that uploads wait in, and what the service says when there is no room for them.

They have no names, lie in the folder that TMPDIR names (else /tmp), and are gone when they are closed.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO

import settings
from helpers import ServiceError, megabytes

log = logging.getLogger(__name__)

LOG_EVERY = 10.0  # seconds
PROBE = b"\0" * 2**16

_lock = Lock()
_next_line: dict[int | None, float] = {}  # by errno, time.monotonic() from which the log gets another line of it


class StorageFull(ServiceError):
    """The temporary folder is full, read-only or missing."""

    status, code = 503, "storage_full"


def new_file() -> IO[bytes]:
    """Return an empty file that waits on the disk, not in memory. Raises OSError."""
    return tempfile.TemporaryFile()


def choose_folder() -> None:
    """Choose the folder, once for the process, and say so in the log where it is not the one that TMPDIR names.

    Python takes the first of several that it can write to. Left to the first upload, that would be another folder in
    each web process when one begins on a full disk.
    """
    wanted = os.environ.get("TMPDIR", "")
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        log_full(error)
        return
    if wanted and Path(wanted).absolute() != Path(folder):
        log.warning("TMPDIR=%s can't be written to, so uploads wait in %s", wanted, folder)


@contextmanager
def out_of_room_is_503(**more: object) -> Iterator[None]:
    """Turn an OSError of a temporary file into StorageFull; the answer has `more` besides."""
    try:
        yield
    except OSError as error:
        log_full(error)
        raise StorageFull(
            "The service has no room to store an upload now, so try again in a few seconds.", **more
        ) from None


def check_room() -> None:
    """Raise StorageFull unless the temporary folder takes a file, and has room for the largest upload.

    Writing tells what free space does not: a quota, a file system that has become read-only.
    """
    with out_of_room_is_503(ready=False):
        with new_file() as file:
            file.write(PROBE)
            file.flush()
            folder = os.fstatvfs(file.fileno())
        free = folder.f_bavail * folder.f_frsize
        if free < settings.MAX_UPLOAD_BYTES:
            raise OSError(f"{megabytes(free)} are free, and an upload may have {megabytes(settings.MAX_UPLOAD_BYTES)}")


def log_full(error: OSError) -> None:
    """Log what is wrong with the temporary folder: one line every LOG_EVERY seconds, however many uploads fail."""
    with _lock:
        if time.monotonic() < _next_line.get(error.errno, 0.0):
            return
        _next_line[error.errno] = time.monotonic() + LOG_EVERY
    folder = tempfile.tempdir or "any temporary folder"
    log.error("Uploads can't be stored in %s (%s): make room there, or set TMPDIR to another folder", folder, error)
