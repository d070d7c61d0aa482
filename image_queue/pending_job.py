"""A job that the web has queued and may have to push again."""

import time
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

from image_queue.job import Job
from image_queue.memory import Reservation, reserve


class PendingJob:
    """The JSON of a job, kept until its answer arrives: in memory, or on disk if too many others wait in memory."""

    def __init__(self, job: Job) -> None:
        """Serialize `job`; the web gives it up at its deadline."""
        self.id = job.id
        self.until = time.monotonic() + job.deadline - time.time()  # not affected by later changes of the clock
        self._content = job.dump()
        self._reservation: Reservation | None = None
        self._file: IO[bytes] | None = None

    def close(self) -> None:
        """Free the memory, or delete the file."""
        self._content, self._reservation = b"", None
        if self._file:
            self._file.close()

    @property
    def remaining(self) -> float:
        """Seconds until the web gives up; 0 afterwards."""
        return max(0.0, self.until - time.monotonic())

    def prepare_to_wait(self) -> None:
        """Reserve memory for the JSON, or move it to an unnamed temporary file. If the disk is full, keep it anyway."""
        if self._file or self._reservation:
            return
        self._reservation = reserve(len(self._content))
        if self._reservation:
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
