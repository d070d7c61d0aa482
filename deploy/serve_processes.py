"""All processes that bin/serve has started, directly or not: find them, and end those that are left over."""

import ctypes
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

KILL_LIMIT = 5  # seconds between SIGTERM and SIGKILL
PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Become the parent of every descendant whose own parent dies, so that we still find it at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_all() -> None:
    """End all our descendants. Returns when none is left, after twice KILL_LIMIT at most."""
    begun = time.monotonic()
    while left := descendants(os.getpid()):
        waited = time.monotonic() - begun
        if waited > 2 * KILL_LIMIT:  # the kernel does not let them die
            break
        end(left, signal.SIGKILL if waited > KILL_LIMIT else signal.SIGTERM)
        time.sleep(0.1)


def end_orphans(supervisor: int) -> None:
    """Kill what a dead program left behind: the children of a killed Apache would keep its port."""
    end(descendants(os.getpid()) - descendants(supervisor) - {supervisor}, signal.SIGKILL)


def end(processes: set[int], number: int) -> None:
    """Send a signal to each process, and reap those of our children that have ended."""
    for pid in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def descendants(parent: int) -> set[int]:
    """Return the children of a process, their children and so on."""
    parents = dict(filter(None, map(parent_of, Path("/proc").glob("[0-9]*"))))
    found: set[int] = set()
    while more := {pid for pid, its in parents.items() if its in found | {parent}} - found:
        found |= more
    return found


def parent_of(folder: Path) -> tuple[int, int] | None:
    """Return (process, parent) for a folder in /proc; None if the process has ended."""
    with suppress(OSError):
        # The parent is the second field after the name, which is in brackets and may contain any character.
        return int(folder.name), int((folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    return None
