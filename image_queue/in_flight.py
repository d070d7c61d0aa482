"""Limits how many images of a process are in flight at once, since each holds a connection to Redis."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

import settings
from image_queue.connection import MAX_CONNECTIONS
from image_queue.errors import QueueFull
from image_queue.pending_job import PendingJob


class InFlight:
    """The images of this process that are in flight, of all models."""

    def __init__(self) -> None:
        self._most = MAX_CONNECTIONS
        self._count = 0
        self._finished = Condition()

    def limit(self, most: int) -> None:
        """Allow `most` images at once."""
        with self._finished:
            self._most = most
            self._finished.notify_all()

    @contextmanager
    def connection_for(self, job: PendingJob) -> Iterator[None]:
        """Wait up to REDIS_TIMEOUT until `job` may use a connection. Raises QueueFull."""
        with self._finished:
            if self._count >= self._most:
                job.prepare_to_wait()
            patience = min(job.remaining, settings.REDIS_TIMEOUT)
            if not self._finished.wait_for(lambda: self._count < self._most, patience):
                raise QueueFull("Redis has no free connection for another image, so try again in a few seconds.")
            self._count += 1
        try:
            yield
        finally:
            with self._finished:
                self._count -= 1
                self._finished.notify()
