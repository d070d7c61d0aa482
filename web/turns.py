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
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path

import settings
from helpers import available_cores

log = logging.getLogger(__name__)

SHARES = 32  # lock files for the memory, each for an equal share; an image locks as many as it needs
POLL_EVERY = 0.01  # seconds between two tries of an image that waits for memory
BORROW_AFTER = 0.01  # seconds for which an image waits before it may use the turn of another process
# Seconds for which a process passes a turn on among its own images, before another process may have it. To pass it to
# another process takes longer.
KEEP, KEEP_BORROWED = 0.05, 0.02

Release = Callable[[], object]


class NoTurn(Exception):
    """There was no turn for an image in time, or no memory."""


class Turn:
    """A turn that this process holds: how to release it, and until when to keep it."""

    def __init__(self, release: Release, keep: float) -> None:
        self.release = release
        self.keep_until = time.monotonic() + keep


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

    def __init__(self, folder: Callable[[], Path], cores: int | None = None) -> None:
        """Share `cores` turns (default: the available cores) by locks in `folder`."""
        self.folder = folder
        self.cores = cores or available_cores()
        self.waiting: deque[Waiter] = deque()
        self.changed = threading.Condition(threading.Lock())
        self.started = False
        self.own_locks: dict[str, threading.Lock] = {}  # used if the folder can't be
        self.warned = False

    @contextmanager
    def turn(self, seconds: float) -> Iterator[None]:
        """Hold a turn, in order of arrival. Raises NoTurn if there is none within `seconds`."""
        turn = self.take(seconds)
        try:
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

    @cached_property
    def own(self) -> int:
        """The number of this process's turn. Processes share one only if there are more of them than turns."""
        for number in range(self.cores):
            if self.lock(f"owner-{number}", fcntl.LOCK_NB):  # never unlocked while this process lives
                return number
        return os.getpid() % self.cores

    @property
    def others(self) -> list[int]:
        """The numbers of the other turns, the next one first."""
        return [(self.own + step) % self.cores for step in range(1, self.cores)]

    def free_turn(self, numbers: list[int]) -> Turn | None:
        """Return the first turn of `numbers` that nobody holds, or None."""
        for number in numbers:
            release = self.lock(f"turn-{number}", fcntl.LOCK_NB)
            if release:
                return Turn(release, KEEP if number == self.own else KEEP_BORROWED)
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
            release = self.lock(f"turn-{self.own}")
            assert release
            with self.changed:
                if self.waiting:
                    self.hand_over(Turn(release, KEEP))
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
        release = self.lock(name, fcntl.LOCK_NB)
        if release:
            held.callback(release)
        return bool(release)

    def lock(self, name: str, how: int = 0) -> Release | None:
        """Lock the file `name` and return what unlocks it. With LOCK_NB in `how`, return None if it is locked already.

        Opens the file each time, since the lock belongs to the open file. If that fails, the limits hold for each
        process alone.
        """
        try:
            file = self.open(name)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | how)
            except OSError:
                os.close(file)
                raise
        except BlockingIOError:
            return None
        except OSError as error:
            if not self.warned:
                log.warning("Each web process limits decoding by itself, since locks can't be shared (%s)", error)
            self.warned = True
            own = self.own_locks.setdefault(name, threading.Lock())
            return own.release if own.acquire(blocking=not how) else None
        return partial(os.close, file)

    def open(self, name: str) -> int:
        """Open a lock file. Raises OSError."""
        folder = self.folder() / "turns"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(f"{folder}/{name}", flags, 0o600)
        except FileNotFoundError:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(f"{folder}/{name}", flags, 0o600)


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
