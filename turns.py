"""How many images are decoded at once: as many as the machine has cores for, and as fit in MAX_DECODE_BYTES.

That counts for all web processes of a service together. They meet in a folder of files, which they lock: the kernel
wakes the next one without a delay, and it takes back the lock of a process that dies.
"""

import fcntl
import hashlib
import logging
import math
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import settings
from helpers import available_cores

log = logging.getLogger(__name__)

SHARES = 32  # in which the memory is given out: an image takes as many as it needs
LOOK_EVERY = 0.01  # seconds, while an image waits for memory
Job = tuple[Future[Any], Callable[[], Any]]


class NoMemoryNow(Exception):
    """The images that are being decoded left no memory for one more, until its time was over."""


class Turns:
    """The turns of all web processes of this service: one for each core.

    A process has a thread for each. Thread number n waits for the lock of turn n and then takes the job that has
    waited longest, so a job never waits for one turn while another is free.
    """

    def __init__(self, folder: Path | None = None, cores: int | None = None) -> None:
        """Use `folder` (one for each service) and as many turns as `cores` (those of the machine)."""
        self.folder = service_folder() if folder is None else folder
        self.cores = cores or available_cores()
        self.jobs: deque[Job] = deque()
        self.arrived = threading.Condition()
        self.threads: list[threading.Thread] = []

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Return the future result of `work`, which runs when its turn has come. Until then it can be cancelled."""
        future: Future[Any] = Future()
        with self.arrived:
            self.jobs.append((future, work))
            if not self.threads:
                self.threads = [
                    threading.Thread(target=self.take_turns, args=[turn], name=f"prepare-{turn}", daemon=True)
                    for turn in range(self.cores)
                ]
                for thread in self.threads:
                    thread.start()
            self.arrived.notify_all()
        return future

    def take_turns(self, turn: int) -> None:
        """Run jobs, one after the other, each while this process has `turn`."""
        while True:
            with self.arrived:
                self.arrived.wait_for(lambda: self.jobs)
            with self.locked(f"turn-{turn}"):
                self.run_next()

    def run_next(self) -> None:
        """Run the job that has waited longest; nothing where another thread has taken it."""
        with self.arrived:
            future, work = self.jobs.popleft() if self.jobs else (None, None)
        if not (future and work and future.set_running_or_notify_cancel()):
            return
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold the lock of this name: wait for it without a limit. Where no file can be had, hold nothing."""
        file = self.open(name)
        try:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            if file is not None:
                os.close(file)

    @contextmanager
    def memory(self, size: int, seconds: float) -> Iterator[None]:
        """Hold `size` bytes of MAX_DECODE_BYTES. Raises NoMemoryNow where they are not there within `seconds`.

        Small images take none, since what a share is more than they need would be lost.
        """
        wanted = min(SHARES, math.ceil(size * SHARES / settings.MAX_DECODE_BYTES - 0.5))
        limit = time.monotonic() + seconds
        with ExitStack() as held:
            if wanted > 0:
                with ExitStack() as turnstile:  # so that two do not wait for each other with half of what they need
                    self.until(limit, lambda: self.try_lock("memory", turnstile))
                    for share in range(wanted):
                        self.until(limit, lambda: any(self.try_lock(f"share-{i}", held) for i in range(SHARES)))
            yield

    def until(self, limit: float, found: Callable[[], bool]) -> None:
        """Return when `found` is true. Raises NoMemoryNow when that is not so at the time `limit`."""
        while not found():
            if time.monotonic() > limit:
                raise NoMemoryNow
            time.sleep(LOOK_EVERY)

    def try_lock(self, name: str, held: ExitStack) -> bool:
        """Whether the lock of this name was free; then it is held with `held`."""
        file = self.open(name)
        if file is None:
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        held.callback(os.close, file)
        return True

    def open(self, name: str) -> int | None:
        """Return the file to lock, opened anew, since locks belong to what was opened; None where it can't be had."""
        try:
            return open_lock(self.folder / name)
        except OSError as error:
            log.warning("can't lock %s, so each web process decodes as if it were alone: %s", self.folder / name, error)
            return None
