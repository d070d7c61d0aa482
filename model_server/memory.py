"""Keeps the peak of a start low: Keras and TensorFlow copy the weights of a model several times."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

from helpers import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, set_malloc

MIB = 2**20


@contextmanager
def sparing_memory() -> Iterator[None]:
    """Return freed memory to the system within the block, also what was freed before it. Slows down allocations."""
    gc.collect()
    _trim()
    set_malloc(M_MMAP_THRESHOLD, MIB // 4)
    try:
        yield
    finally:
        # What glibc would choose itself after a block of 32 MiB, its limit: activations come from memory that it keeps.
        set_malloc(M_MMAP_THRESHOLD, 32 * MIB)
        set_malloc(M_TRIM_THRESHOLD, 64 * MIB)
        _trim()


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim:
        trim(0)
