"""Memory of this process for what waits: uploads for their turn to be decoded, jobs for their answer.

Hundreds may wait at once. What finds no room here waits in temporary files.
"""

from collections import deque
from threading import Lock

MOST = 2**24  # bytes in use at once: room for 32 uploads of 432 kB, which cost the web 3% more CPU in files

_lock = Lock()
_free = MOST
_returned: deque[int] = deque()  # sizes of reservations that have ended, not yet added to _free


class Reservation:
    """A part of the memory, in use for as long as this object is referenced."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __del__(self) -> None:
        # Must not lock: garbage may be collected at any moment, even while this thread holds the lock.
        _returned.append(self._size)


def reserve(size: int) -> Reservation | None:
    """Return a reservation of `size` bytes; None if fewer are left."""
    global _free  # noqa: PLW0603 - one limit for the whole process
    with _lock:
        while _returned:
            _free += _returned.popleft()
        if size > _free:
            return None
        _free -= size
    return Reservation(size)
