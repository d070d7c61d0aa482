"""Keeps the peak of a start low: Keras and TensorFlow copy the weights of a model several times."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

MIB = 2**20
# mallopt(3): larger blocks go back to the system when they are freed; and how much of malloc's own memory it may keep.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


@contextmanager
def sparing_memory() -> Iterator[None]:
    """Return freed memory to the system within the block, also what was freed before it. Slows down allocations."""
    libc = ctypes.CDLL(None)
    gc.collect()
    libc.malloc_trim(0)
    libc.mallopt(M_MMAP_THRESHOLD, MIB // 4)
    try:
        yield
    finally:
        # What glibc would choose itself after a block of 32 MiB, its limit: activations come from memory that it keeps.
        libc.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * MIB)
        libc.malloc_trim(0)
