"""Temporary files for uploads, and the error when they can't be written.

The files are unnamed, in the folder TMPDIR (default /tmp), and disappear when they are closed.
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
from helpers import megabytes
from web.errors import WebError

log = logging.getLogger(__name__)

LOG_EVERY = 10.0  # seconds
PROBE = b"\0" * 2**16

_lock = Lock()
_next_log: dict[int | None, float] = {}  # for each errno, the time.monotonic() from which it is logged again


class StorageFull(WebError):
    """The temporary folder is full, read-only or missing."""

    status, code = 503, "storage_full"


def new_file() -> IO[bytes]:
    """Return an empty temporary file. Raises OSError."""
    return tempfile.TemporaryFile()


def choose_temporary_folder() -> None:
    """Choose the temporary folder now, and log a warning if it is not TMPDIR.

    Python takes the first writable one of several folders. If the first upload made that choice, the web processes
    could choose different folders when the disk is full.
    """
    wanted = os.environ.get("TMPDIR", "")
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        log_storage_error(error)
        return
    if wanted and Path(wanted).absolute() != Path(folder):
        log.warning("TMPDIR=%s is not writable, so uploads are stored in %s", wanted, folder)


@contextmanager
def storage_errors(**more: object) -> Iterator[None]:
    """Turn an OSError from a temporary file into StorageFull, with `more` fields in the response."""
    try:
        yield
    except OSError as error:
        log_storage_error(error)
        raise StorageFull(
            "The service has no room to store an upload now, so try again in a few seconds.", **more
        ) from None


def check_free_space() -> None:
    """Raise StorageFull unless the temporary folder is writable and has room for the largest upload.

    A test write also detects an exhausted quota or a file system that became read-only.
    """
    with storage_errors(ready=False):
        with new_file() as file:
            file.write(PROBE)
            file.flush()
            folder = os.fstatvfs(file.fileno())
        free = folder.f_bavail * folder.f_frsize
        if free < settings.MAX_UPLOAD_BYTES:
            raise OSError(f"{megabytes(free)} are free, but an upload may take {megabytes(settings.MAX_UPLOAD_BYTES)}")


def log_storage_error(error: OSError) -> None:
    """Log why an upload can't be stored, each errno at most once every LOG_EVERY seconds."""
    with _lock:
        if time.monotonic() < _next_log.get(error.errno, 0.0):
            return
        _next_log[error.errno] = time.monotonic() + LOG_EVERY
    folder = tempfile.tempdir or "any temporary folder"
    log.error("Uploads can't be stored in %s (%s): free some space, or set TMPDIR to another folder", folder, error)
