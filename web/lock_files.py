"""Locks that the web processes of a service share: files in a folder.

The kernel wakes the next waiter without delay, and releases the locks of a process that dies.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

log = logging.getLogger(__name__)

Release = Callable[[], object]


class LockFiles:
    """The locks in a folder. If it can't be used, a warning says so, and the locks hold for this process alone."""

    def __init__(self, folder: Callable[[], Path]) -> None:
        self._folder = folder
        self._own_locks: dict[str, threading.Lock] = {}  # used if the folder can't be
        self._warned = False

    def lock(self, name: str, how: int = 0) -> Release | None:
        """Lock the file `name` and return what unlocks it. With LOCK_NB in `how`, return None if it is locked already.

        Two threads can't hold a lock at once either.
        """
        try:
            return partial(os.close, self._locked(name, how))
        except BlockingIOError:
            return None
        except OSError as error:
            if not self._warned:
                log.warning("Each web process limits decoding by itself, since locks can't be shared (%s)", error)
            self._warned = True
            own = self._own_locks.setdefault(name, threading.Lock())
            return own.release if own.acquire(blocking=not how) else None

    def claim(self, name: str, count: int) -> int | None:
        """Return the first number below `count` that no other process has, and keep it while this process lives.

        Return None if there is none, or if the folder can't be used.
        """
        for number in range(count):
            with suppress(OSError):
                self._locked(f"{name}-{number}", fcntl.LOCK_NB)  # never closed
                return number
        return None

    def _locked(self, name: str, how: int) -> int:
        """Open the file `name` anew, since the lock belongs to the open file, and lock it. Raises OSError."""
        file = self._open(name)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | how)
        except OSError:
            os.close(file)
            raise
        return file

    def _open(self, name: str) -> int:
        folder = self._folder() / "turns"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(f"{folder}/{name}", flags, 0o600)
        except FileNotFoundError:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(f"{folder}/{name}", flags, 0o600)
