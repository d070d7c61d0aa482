"""A value that is read from Redis again from time to time."""

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock
from typing import Generic, TypeVar

from redis.exceptions import RedisError

Value = TypeVar("Value")


class Refreshed(Generic[Value]):
    """A cached value. One thread refreshes it every `seconds`, and the others use the cached one.

    If that is older than twice as long, they wait up to `seconds` for the new one. If Redis does not answer, the cached
    one is kept.
    """

    def __init__(self, read: Callable[[], Value | None], first: Value, seconds: float) -> None:
        """Begin with `first`; `read` returns the value, or None to keep the cached one. It may raise RedisError."""
        self.cached = first
        self._read = read
        self._seconds = seconds
        self._next = 0.0  # time.monotonic() from which the value is out of date
        self._refreshing = Lock()

    def value(self) -> Value:
        """Return the value."""
        overdue = time.monotonic() - self._next
        if overdue >= 0:
            self._refresh(self._seconds if overdue > self._seconds else 0.0)
        return self.cached

    def latest(self) -> Value:
        """Return the value as it was at most a tenth of `seconds` ago."""
        self._refresh(self._seconds, 0.9 * self._seconds)
        return self.cached

    def _refresh(self, patience: float, early: float = 0.0) -> None:
        if not self._refreshing.acquire(timeout=patience):
            return
        try:
            if time.monotonic() >= self._next - early:
                with suppress(RedisError):
                    value = self._read()
                    self.cached = self.cached if value is None else value
                self._next = time.monotonic() + self._seconds
        finally:
            self._refreshing.release()
