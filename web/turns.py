"""How many images are decoded at once: as many as the machine has cores for, and as fit in MAX_DECODE_BYTES.

That counts for all web processes of a service together. They meet in a folder of files, which they lock: the kernel
wakes the next one without a delay, and it takes back the locks of a process that dies.
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

SHARES = 32  # in which the memory is given out: an image holds as many as it needs
T = TypeVar("T")
LOOK_EVERY = 0.01  # seconds, while an image waits for memory


class NoMemoryNow(Exception):
    """The images that are being decoded left no memory for one more until its time was over."""


class Turns:
    """The turns of all web processes of a service: one for each core.

    A process has a thread for each. Thread number n waits for the lock of turn n and only then takes the job that has
    waited longest, so that no job waits for one turn while another is free.
    """

    def __init__(self, folder: Callable[[], Path], cores: int | None = None) -> None:
        """Have `cores` turns (those of the machine), which are locked in the `folder` that the processes share."""
        self.folder = folder
        self.cores = cores or available_cores()
        self.jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self.arrived = threading.Condition()
        self.threads: list[threading.Thread] = []
        self.warned = False

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Return the future result of `work`, which runs when its turn has come. Until then it can be cancelled."""
        future: Future[T] = Future()
        with self.arrived:
            self.jobs.append((future, work))
            if not self.threads:
                self.start()
            self.arrived.notify_all()
        return future

    def start(self) -> None:
        """Start the threads."""
        for turn in range(self.cores):
            self.threads.append(
                threading.Thread(target=self.take_turns, args=[turn], name=f"prepare-{turn}", daemon=True)
            )
            self.threads[-1].start()

    def take_turns(self, turn: int) -> None:
        """Run jobs, one after the other, each while this process has `turn`."""
        while True:
            with self.arrived:
                self.arrived.wait_for(lambda: self.jobs)
            with ExitStack() as held:
                self.lock(f"turn-{turn}", held)
                self.run_next()
            os.sched_yield()  # another process that waits for the turn was woken just now

    def run_next(self) -> None:
        """Run the job that has waited longest; nothing where another thread has taken it."""
        with self.arrived:
            if not self.jobs:
                return
            future, work = self.jobs.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:  # whoever waits for the result gets it
            future.set_exception(error)
        finally:
            del future, work  # an error keeps this frame

    @contextmanager
    def memory(self, size: int, seconds: float) -> Iterator[None]:
        """Hold `size` bytes of MAX_DECODE_BYTES. Raises NoMemoryNow where they are not free within `seconds`.

        An image of less than half a share holds none: there are only as many of them as cores.
        """
        wanted = min(SHARES, math.ceil(size * SHARES / settings.MAX_DECODE_BYTES - 0.5))
        limit = time.monotonic() + seconds
        with ExitStack() as held:
            with ExitStack() as turnstile:  # one after the other, or two could wait for each other's half
                if wanted > 0:
                    wait(limit, lambda: self.lock("memory", turnstile, fcntl.LOCK_NB))
                    shares = {f"share-{number}" for number in range(SHARES)}
                    wait(limit, lambda: self.lock_some(shares, wanted, held))
            yield

    def lock_some(self, shares: set[str], wanted: int, held: ExitStack) -> bool:
        """Lock such of `shares` as are free, and take them out of it; whether `wanted` are locked in all."""
        for share in list(shares):
            if SHARES - len(shares) == wanted:
                break
            if self.lock(share, held, fcntl.LOCK_NB):
                shares.remove(share)
        return SHARES - len(shares) == wanted

    def lock(self, name: str, held: ExitStack, how: int = 0) -> bool:
        """Lock the file of this name until `held` ends; whether that could be done at once, with `how` LOCK_NB.

        Each time it is opened anew, since a lock belongs to what was opened. Where there is no file, nothing is locked:
        then each process counts for itself.
        """
        try:
            folder = self.folder() / "turns"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if not self.warned:
                log.warning("each web process decodes as if it were alone, since turns can't be locked (%s)", error)
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
    """Return when `condition` is true. Raises NoMemoryNow when it is not at the time `limit`."""
    while not condition():
        if time.monotonic() > limit:
            raise NoMemoryNow
        time.sleep(LOOK_EVERY)
