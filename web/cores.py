"""Keep each web process on cores of its own.

During a request, the threads of a process pass its Python interpreter on to each other dozens of times. If the next one
is on another core, that core must be woken, and its caches hold another process's data. With one core for each of two
processes, the service answers 13% more JPEG files of 90 kB with a model that costs nothing, and 30% more beside a
program that uses a whole core (docs/performance.md).
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

THREADS = Path("/proc/self/task")


class Cores:
    """The cores of this process: all that it may use, until it keeps to its own."""

    def __init__(self) -> None:
        self.all = os.sched_getaffinity(0)
        self._own = self.all

    def keep_to(self, own: set[int]) -> None:
        """Make every thread of this process, and every one that it starts, use only the cores `own`."""
        self._own = own
        for thread in THREADS.iterdir():
            set_cores(int(thread.name), own)

    @contextmanager
    def use_all(self) -> Iterator[None]:
        """Let this thread use every core during the block."""
        if self._own == self.all:
            yield
            return
        set_cores(0, self.all)
        try:
            yield
        finally:
            set_cores(0, self._own)


def set_cores(thread: int, cores: set[int]) -> None:
    """Let a thread (0: the calling one) use only `cores`. Does nothing if it has ended, or if the system forbids it."""
    with suppress(OSError):
        os.sched_setaffinity(thread, cores)


def share_of(cores: Collection[int], number: int, processes: int) -> set[int]:
    """Return the part of `cores` that is for process `number` of `processes`; `number` is below either count.

    Every core is in one part, or if there are fewer cores than processes, in that of the process with its number.
    """
    ordered, parts = sorted(cores), min(processes, len(cores))
    return set(ordered[number * len(ordered) // parts : (number + 1) * len(ordered) // parts])
