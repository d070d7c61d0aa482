"""How many images are computed together: batch sizes, which warm-up measures, and how many batches at once."""

import logging
import time
from collections.abc import Callable

from helpers import Pixels
from model_server.model_errors import out_of_memory

log = logging.getLogger(__name__)

# How many batches a model server computes at once: while one waits for its slowest thread, or for Python to start it,
# the other computes. With ResNet50 on a CPU that is 5 to 10% faster than one at a time. A third gains nothing.
BATCHES_AT_ONCE = 2
# Seconds to take a batch and to answer it, in addition to computing it. For a model that takes a millisecond per image,
# this makes small batches slow.
BATCH_OVERHEAD = 0.002
NOISE = 1.03  # warm-up can't measure more precisely: within 3%, two sizes count as equally fast
LONG = 0.1  # seconds: in a batch that takes this long, the overhead no longer matters


class BatchSizes:
    """The compiled batch sizes, and the `seconds` that a batch of each size takes."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    @property
    def best(self) -> int:
        """The size to use: the smallest of the fastest sizes (per image) that takes at least LONG, or else the largest.

        A larger batch would be no faster and answer its first image later. Usually BATCH_SIZE on a GPU, less on a CPU.
        """
        fastest = min(map(self._seconds_per_image, self.seconds))
        near = [size for size in self.seconds if self._seconds_per_image(size) <= fastest * NOISE]
        return min((size for size in near if self.seconds[size] >= LONG), default=max(near))

    def measure(self, compute: Callable[[Pixels], object], images: Pixels) -> None:
        """Compile and time `compute` with the first 1, 2, 4, ... `images`, until larger batches are no faster."""
        most = len(images)
        for size in [*(2**i for i in range((most - 1).bit_length())), most]:
            try:
                self.seconds[size] = _time(compute, images[:size])
            except Exception as error:
                if not (self.seconds and out_of_memory(error)):
                    raise
                self.limit(size)
                break
            if size >= 4 * self.best:
                break
        self._drop_above(self.best)

    def limit(self, size: int) -> None:
        """Use only smaller sizes from now on: a batch of `size` does not fit in memory."""
        self._drop_above(size - 1)
        log.warning("A batch of %d does not fit in memory: computing at most %d at once", size, max(self.seconds))

    def cover(self, count: int) -> list[int]:
        """Return the sizes that compute `count` images in the least time; the last batch may need padding."""
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for n in range(1, count + 1):
            options = ((best[max(0, n - size)], size, seconds) for size, seconds in self.seconds.items())
            best.append(min((rest[0] + seconds, [size, *rest[1]]) for rest, size, seconds in options))
        return best[count][1]

    def _drop_above(self, most: int) -> None:
        self.seconds = {size: seconds for size, seconds in self.seconds.items() if size <= most}

    def _seconds_per_image(self, size: int) -> float:
        return (self.seconds[size] + BATCH_OVERHEAD) / size


def _time(compute: Callable[[Pixels], object], images: Pixels) -> float:
    """Return the seconds that a compiled call takes; the better of two if short, as other programs may disturb it."""

    def once() -> float:
        started = time.perf_counter()
        compute(images)
        return time.perf_counter() - started

    compute(images)  # compiles
    seconds = once()
    return seconds if seconds >= LONG else min(seconds, once())
