"""Limit how many images are decoded at once: one for each core, and together within MAX_DECODE_BYTES.

The limit covers all web processes of a service. They share a folder of files that serve as locks: the kernel wakes the
next waiter without delay, and releases the locks of a process that dies.
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

SHARES = 32  # the memory is divided into so many locks; an image holds as many as it needs
T = TypeVar("T")
POLL_EVERY = 0.01  # seconds, while an image waits for memory


class MemoryTimeout(Exception):
    """The images being decoded left no memory for one more within its time limit."""


class Turns:
    """Runs jobs, as many at once in all web processes of a service as there are turns: one for each core.

    Each process has a thread for each turn. Thread n waits for the lock of turn n, and only then takes the oldest job,
    so no job waits for one turn while another is free.
    """

    def __init__(self, folder: Callable[[], Path], cores: int | None = None) -> None:
        """Share `cores` turns (default: the available cores) through locks in `folder`. Start no thread yet."""
        self.folder = folder
        self.cores = cores or available_cores()
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.arrived = threading.Condition()
        self.threads: list[threading.Thread] = []
        self.warned = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Return a future for the result of `work`, which can be cancelled until its turn comes."""
        future: Future[T] = Future()
        with self.arrived:
            self.jobs.append((future, work))
            if not self.threads:
                self.start_threads()
            self.arrived.notify_all()
        return future

    def start_threads(self) -> None:
        """Start a thread for each turn."""
        for turn in range(self.cores):
            self.threads.append(
                threading.Thread(target=self.take_turns, args=[turn], name=f"prepare-{turn}", daemon=True)
            )
            self.threads[-1].start()

    def take_turns(self, turn: int) -> None:
        """Run jobs one after the other, each while holding the lock of `turn`."""
        while True:
            with self.arrived:
                self.arrived.wait_for(lambda: self.jobs)
            with ExitStack() as held:
                self.lock(f"turn-{turn}", held)
                self.run_next()
            os.sched_yield()  # to another process that waits for the lock

    def run_next(self) -> None:
        """Run the oldest job, unless other threads have taken them all."""
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
        """Hold `size` bytes of MAX_DECODE_BYTES. Raises MemoryTimeout if they are not free within `seconds`.

        An image smaller than half a share holds none: there are at most as many of those as cores.
        """
        wanted = min(SHARES, math.ceil(size * SHARES / settings.MAX_DECODE_BYTES - 0.5))
        limit = time.monotonic() + seconds
        with ExitStack() as held:
            with ExitStack() as collecting:  # one image at a time, or two could deadlock with half of their shares each
                if wanted > 0:
                    wait(limit, lambda: self.lock("memory", collecting, fcntl.LOCK_NB))
                    shares = {f"share-{number}" for number in range(SHARES)}
                    wait(limit, lambda: self.lock_shares(shares, wanted, held))
            yield

    def lock_shares(self, shares: set[str], wanted: int, held: ExitStack) -> bool:
        """Lock the free ones of `shares` and remove them from the set; return whether `wanted` are now locked."""
        for share in list(shares):
            if SHARES - len(shares) == wanted:
                break
            if self.lock(share, held, fcntl.LOCK_NB):
                shares.remove(share)
        return SHARES - len(shares) == wanted

    def lock(self, name: str, held: ExitStack, how: int = 0) -> bool:
        """Lock the file `name` until `held` ends. With LOCK_NB in `how`, return False if another holds the lock.

        The file is opened each time, since the lock belongs to the open file. If it can't be opened, nothing is locked
        and each process has its own turns.
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


def wait(limit: float, condition: Callable[[], bool]) -> None:
    """Return when `condition` is true. Raises MemoryTimeout at the monotonic time `limit`."""
    while not condition():
        if time.monotonic() > limit:
            raise MemoryTimeout
        time.sleep(POLL_EVERY)
