"""Decodes the images of jobs into the array that the model gets."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

import settings
from helpers import Pixels, Shape, as_pixels, base64_decode_image
from image_queue import Job

log = logging.getLogger(__name__)


class Tray:
    """An array for the pixels of a batch, which is used again for later batches.

    Thus no image is copied twice, and the system need not provide fresh memory for each. A tray takes no more memory
    than the largest batch that was in it.
    """

    def __init__(self, size: int, shape: Shape) -> None:
        """Make room for `size` images of `shape`."""
        self._shape = shape
        self._pixels: Pixels = np.empty((size, *shape), settings.IMAGE_DTYPE)

    def placer(self, used: Sequence[int | None]) -> Callable[[Job], int | None]:
        """Return a function that moves the image of a job to the next row that is not `used`, and returns the row.

        It returns None if the image can't be decoded.
        """
        free = iter(sorted(set(range(len(self._pixels))).difference(used)))

        def place(job: Job) -> int | None:
            try:
                pixels = self._decode(job)
            except ValueError as error:
                log.error("The image of request %s can't be decoded: %s", job.request or job.id, error)
                return None
            row = next(free)
            self._pixels[row] = pixels
            job.image = b""
            return row

        return place

    def images(self, rows: Sequence[int | None]) -> Pixels:
        """Return the images in these rows, (n, height, width, channels), without a copy if there are no gaps."""
        full = [row for row in rows if row is not None]
        return self._pixels[: len(full)] if full == list(range(len(full))) else self._pixels[full]

    def _decode(self, job: Job) -> Pixels:
        as_sent = settings.IMAGE_DTYPE, job.shape or self._shape
        if isinstance(job.image, bytes):
            return resized(as_pixels(job.image, *as_sent), self._shape)
        return resized(base64_decode_image(job.image, *as_sent), self._shape)


def resized(pixels: Pixels, shape: Shape) -> Pixels:
    """Return `pixels`, 0..255 in any shape, in this `shape`.

    The shapes differ if the job was queued for another model, or before the web knew the shape of this one.
    """
    if pixels.shape == shape:
        return pixels
    height, width, channels = shape
    levels = np.nan_to_num(pixels).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0])
    image = image.convert("RGB" if channels == 3 else "L")
    small = image.resize((width, height), Image.Resampling[settings.IMAGE_RESAMPLE.upper()])
    return np.asarray(small, dtype=settings.IMAGE_DTYPE).reshape(shape)
