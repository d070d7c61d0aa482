"""Limit how many images are decoded at once: one for each core, and together within MAX_DECODE_BYTES.

The limits hold for all web processes of a service together, by the locks of lock_files.py.
"""

import fcntl
import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import settings
from helpers import available_cores
from web.cores import Cores
from web.lock_files import LockFiles, Release

SHARES = 32  # lock files for the memory, each for an equal share; an image locks as many as it needs
POLL_EVERY = 0.01  # seconds between two tries of an image that waits for memory
BORROW_AFTER = 0.01  # seconds for which an image waits before it may use the turn of another process
# Seconds for which a process passes a turn on among its own images, before another process may have it. To pass it to
# another process takes longer.
KEEP, KEEP_BORROWED = 0.05, 0.02
CLAIM_EVERY = 1.0  # seconds between two tries to get a number


class NoTurn(Exception):
    """There was no turn for an image in time, or no memory."""


class Turn:
    """A turn that this process holds: how to release it, whether it is borrowed, and until when to keep it."""

    def __init__(self, release: Release, *, borrowed: bool) -> None:
        self.release = release
        self.borrowed = borrowed
        self.keep_until = time.monotonic() + (KEEP_BORROWED if borrowed else KEEP)


class Waiter:
    """A thread that waits for a turn."""

    def __init__(self) -> None:
        self.turn: Turn | None = None
        self.called = threading.Lock()  # released when it has a turn
        self.called.acquire()


class Turns:
    """Limits the threads of all web processes of a service that decode at once. There is one turn per core.

    Each process has a turn of its own and borrows another only if that has been free for a moment. Two images that are
    decoded in one process compete for its Python interpreter: with 16 cores and processes whose turns were anybody's,
    a third of the cores had nothing to do.

    A thread locks its process's free turn by itself. Otherwise it waits, and a thread per process waits for the turn's
    lock, to hand the turn to the thread that has waited longest.
    """

    def __init__(self, folder: Callable[[], Path], count: int | None = None, processes: int | None = None) -> None:
        """Share `count` turns (default: one for each available core) by locks in `folder`.

        `processes` is the number of web processes, if known.
        """
        self.count = count or available_cores()
        self.processes = processes
        self.cores = Cores()
        self.locks = LockFiles(folder)
        self.waiting: deque[Waiter] = deque()
        self.changed = threading.Condition(threading.Lock())
        self.started = False
        self._number: int | None = None
        self._claim_at = 0.0  # time.monotonic() of the next try
        self._claiming = threading.Lock()

    @contextmanager
    def turn(self, seconds: float) -> Iterator[None]:
        """Hold a turn, in order of arrival. Raises NoTurn if there is none within `seconds`."""
        turn = self.take(seconds)
        try:
            with self.cores.use_all() if turn.borrowed else nullcontext():
                yield
        finally:
            self.give_back(turn)

    def take(self, seconds: float) -> Turn:
        """Return a turn. Raises NoTurn."""
        with self.changed:
            turn = None if self.waiting else self.free_turn([self.own])
            if turn:
                return turn
            waiter = Waiter()
            self.waiting.append(waiter)
            self.start_threads()
            self.changed.notify_all()
        if not waiter.called.acquire(timeout=max(0.0, seconds)):
            with self.changed:
                if not waiter.turn:
                    self.waiting.remove(waiter)
                    waiter.turn = self.free_turn(self.others)
        if not waiter.turn:
            raise NoTurn
        return waiter.turn

    def give_back(self, turn: Turn) -> None:
        """Hand `turn` to the thread that has waited longest, or release it."""
        with self.changed:
            if self.waiting and time.monotonic() < turn.keep_until:
                self.hand_over(turn)
                return
        turn.release()
        os.sched_yield()  # to another process that waits for the lock

    def hand_over(self, turn: Turn) -> None:
        """Give `turn` to the thread that has waited longest."""
        waiter = self.waiting.popleft()
        waiter.turn = turn
        waiter.called.release()

    @property
    def own(self) -> int:
        """The number of this process's turn. Processes share one while there are more of them than turns."""
        number = self.number()
        return os.getpid() % self.count if number is None else number

    def number(self) -> int | None:
        """Return a number that no other process has while this one lives; None while others have all of them."""
        with self._claiming:
            if self._number is None and time.monotonic() >= self._claim_at:
                self._number = self.locks.claim("owner", min(self.count, self.processes or self.count))
                self._claim_at = time.monotonic() + CLAIM_EVERY
            return self._number

    @property
    def others(self) -> list[int]:
        """The numbers of the other turns, the next one first."""
        return [(self.own + step) % self.count for step in range(1, self.count)]

    def free_turn(self, numbers: list[int]) -> Turn | None:
        """Return the first turn of `numbers` that nobody holds, or None."""
        for number in numbers:
            release = self.locks.lock(f"turn-{number}", fcntl.LOCK_NB)
            if release:
                return Turn(release, borrowed=number != self.own)
        return None

    def start_threads(self) -> None:
        """Start the threads that hand out turns, unless they run already."""
        if self.started:
            return
        self.started = True
        for hand_out in (self.hand_out_own, self.hand_out_borrowed):
            threading.Thread(target=hand_out, name=hand_out.__name__, daemon=True).start()

    def hand_out_own(self) -> None:
        """As long as threads wait, hand this process's turn to them whenever it is free."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
            release = self.locks.lock(f"turn-{self.own}")
            assert release
            with self.changed:
                if self.waiting:
                    self.hand_over(Turn(release, borrowed=False))
                    continue
            release()

    def hand_out_borrowed(self) -> None:
        """As long as threads wait, hand them turns that other processes leave free."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
            time.sleep(BORROW_AFTER)  # another process that needs its turn has it by then
            with self.changed:
                turn = self.free_turn(self.others) if self.waiting else None
                if turn:
                    self.hand_over(turn)

    @contextmanager
    def memory(self, size: int, seconds: float) -> Iterator[None]:
        """Reserve `size` bytes of MAX_DECODE_BYTES. Raises NoTurn if they are not free within `seconds`.

        An image of less than half a share reserves none; there is at most one of those per core.
        """
        wanted = min(SHARES, math.ceil(size * SHARES / settings.MAX_DECODE_BYTES - 0.5))
        with ExitStack() as held:
            if wanted > 0:
                self.collect(wanted, time.monotonic() + seconds, held)
            try:
                yield
            except Exception as error:
                clear_frames_of(error)  # before another image gets the memory
                raise

    def collect(self, wanted: int, limit: float, held: ExitStack) -> None:
        """Lock `wanted` shares until `held` ends. Raises NoTurn at the monotonic time `limit`."""
        with ExitStack() as alone:  # one image at a time: two, each with half of its shares, could deadlock
            wait_until(limit, lambda: self.lock_until("memory", alone))
            shares = {f"share-{number}" for number in range(SHARES)}
            wait_until(limit, lambda: self.lock_shares(shares, wanted, held))

    def lock_shares(self, shares: set[str], wanted: int, held: ExitStack) -> bool:
        """Lock those of `shares` that are free and remove them from the set; return whether `wanted` are locked."""
        for share in list(shares):
            if SHARES - len(shares) == wanted:
                break
            if self.lock_until(share, held):
                shares.remove(share)
        return SHARES - len(shares) == wanted

    def lock_until(self, name: str, held: ExitStack) -> bool:
        """Lock the file `name` until `held` ends. Return False if it is locked already."""
        release = self.locks.lock(name, fcntl.LOCK_NB)
        if release:
            held.callback(release)
        return bool(release)


def clear_frames_of(error: BaseException | None) -> None:
    """Clear the variables of the functions that an error and its causes came through: they keep an image alive."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def wait_until(limit: float, condition: Callable[[], bool]) -> None:
    """Poll until `condition` is true. Raises NoTurn at the monotonic time `limit`."""
    while not condition():
        if time.monotonic() > limit:
            raise NoTurn
        time.sleep(POLL_EVERY)
