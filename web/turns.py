"""Limit how many images are decoded at once: one for each core, and together within MAX_DECODE_BYTES.

The limits hold for all web processes of a service together. The processes share a folder of lock files: the kernel
wakes the next waiter without delay, and releases the locks of a process that dies.
"""

import fcntl
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import settings
from helpers import available_cores

log = logging.getLogger(__name__)

SHARES = 32  # lock files for the memory, each for an equal share; an image locks as many as it needs
T = TypeVar("T")
POLL_EVERY = 0.01  # seconds between two tries of an image that waits for memory


class MemoryTimeout(Exception):
    """The memory for an image was not free in time."""


class Turns:
    """Runs one job at a time for each turn. All web processes of a service share the turns, one per core.

    Each process has one thread per turn. Thread n waits for the lock of turn n and only then takes the oldest job, so
    no job waits for one turn while another is free.
    """

    def __init__(self, folder: Callable[[], Path], cores: int | None = None) -> None:
        """Share `cores` turns (default: the available cores) by locks in `folder`. Threads start with the first job."""
        self.folder = folder
        self.cores = cores or available_cores()
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.arrived = threading.Condition()
        self.threads: list[threading.Thread] = []
        self.warned = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Return a future for the result of `work`, which can be canceled until its turn comes."""
        future: Future[T] = Future()
        with self.arrived:
            self.jobs.append((future, work))
            if not self.threads:
                self.start_threads()
            self.arrived.notify_all()
        return future

    def start_threads(self) -> None:
        """Start one thread per turn."""
        for turn in range(self.cores):
            thread = threading.Thread(target=self.take_turns, args=[turn], name=f"prepare-{turn}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def take_turns(self, turn: int) -> None:
        """Run jobs one after another, holding the lock of `turn` during each."""
        while True:
            with self.arrived:
                self.arrived.wait_for(lambda: self.jobs)
            with ExitStack() as held:
                self.lock(f"turn-{turn}", held)
                self.run_next()
            os.sched_yield()  # to another process that waits for the lock

    def run_next(self) -> None:
        """Run the oldest job, if other threads have left one."""
        with self.arrived:
            if not self.jobs:
                return
            future, work = self.jobs.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # result() raises it
            future.set_exception(error)
        finally:
            del future, work  # the error's traceback keeps this frame alive

    @contextmanager
    def memory(self, size: int, seconds: float) -> Iterator[None]:
        """Reserve `size` bytes of MAX_DECODE_BYTES. Raises MemoryTimeout if they are not free within `seconds`.

        An image of less than half a share reserves none; there is at most one of those per core.
        """
        wanted = min(SHARES, math.ceil(size * SHARES / settings.MAX_DECODE_BYTES - 0.5))
        limit = time.monotonic() + seconds
        with ExitStack() as held:
            with ExitStack() as collecting:  # one image at a time: two, each with half of its shares, could deadlock
                if wanted > 0:
                    wait_until(limit, lambda: self.lock("memory", collecting, fcntl.LOCK_NB))
                    shares = {f"share-{number}" for number in range(SHARES)}
                    wait_until(limit, lambda: self.lock_shares(shares, wanted, held))
            yield

    def lock_shares(self, shares: set[str], wanted: int, held: ExitStack) -> bool:
        """Lock those of `shares` that are free and remove them from the set; return whether `wanted` are locked."""
        for share in list(shares):
            if SHARES - len(shares) == wanted:
                break
            if self.lock(share, held, fcntl.LOCK_NB):
                shares.remove(share)
        return SHARES - len(shares) == wanted

    def lock(self, name: str, held: ExitStack, how: int = 0) -> bool:
        """Lock the file `name` until `held` ends. With LOCK_NB in `how`, return False if it is locked already.

        Opens the file each time, since the lock belongs to the open file. If that fails, nothing is locked, and the
        limits hold for each process alone.
        """
        try:
            folder = self.folder() / "turns"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not self.warned:
                log.warning("Each web process limits decoding by itself, since locks can't be shared (%s)", error)
            self.warned = True
            return True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | how)
        except BlockingIOError:
            os.close(file)
            return False
        held.callback(os.close, file)
        return True


def wait_until(limit: float, condition: Callable[[], bool]) -> None:
    """Poll until `condition` is true. Raises MemoryTimeout at the monotonic time `limit`."""
    while not condition():
        if time.monotonic() > limit:
            raise MemoryTimeout
        time.sleep(POLL_EVERY)
