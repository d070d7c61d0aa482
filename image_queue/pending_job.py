"""A job that the web has queued and may have to push again."""

import time
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

from image_queue.job import Job


class PendingJob:
    """The JSON of a job, kept until its answer arrives. Hundreds wait at once, so it can be moved to disk."""

    def __init__(self, job: Job) -> None:
        """Serialize `job`; the web gives it up at its deadline."""
        self.id = job.id
        self.until = time.monotonic() + job.deadline - time.time()  # not affected by later changes of the clock
        self._content = job.dump()
        self._file: IO[bytes] | None = None

    def close(self) -> None:
        """Delete the file, if there is one."""
        if self._file:
            self._file.close()

    @property
    def remaining(self) -> float:
        """Seconds until the web gives up; 0 afterwards."""
        return max(0.0, self.until - time.monotonic())

    def move_to_disk(self) -> None:
        """Move the JSON from memory to an unnamed temporary file. If the disk is full, it stays in memory."""
        if self._file:
            return
        with suppress(OSError):
            file = TemporaryFile(buffering=0)  # noqa: SIM115 - close() does
            if file.write(self._content) == len(self._content):
                self._file, self._content = file, b""

    def read(self) -> bytes:
        """Return the JSON from memory or disk."""
        if not self._file:
            return self._content
        self._file.seek(0)
        return self._file.read()
