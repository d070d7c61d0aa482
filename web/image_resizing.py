"""Make images smaller with the Rust library fast_image_resize, by its binding cykooz-resizer, in a fifth of the time.

The result is Pillow's, but for one level (of 256) in one value of 300. Where the library can't be used, Pillow resizes.
"""

import logging
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from helpers import Pixels

log = logging.getLogger(__name__)

# Pillow's names: the library's. Its box filter treats pixels on an edge of the box differently.
FILTERS = {"bilinear": "bilinear", "bicubic": "catmull_rom", "lanczos": "lanczos3"}
MAX_WIDTH = 2**14  # pixels: the filter's table for a row takes longer than the few such rows of a strip
STRIP_PIXELS = 2**17  # small enough for the processor's cache, and for memory that is used again
MOST_DIFFERENCE = 2  # levels, from Pillow's result for a known image

Size = tuple[int, int]  # width, height
Rows = Callable[[int, int], bytes]  # returns the pixels of the rows from one number up to another
Shrink = Callable[[Rows, Size, Size], Pixels]


def shrinker(source: Size, target: Size, resample: str) -> Shrink | None:
    """Return a function that makes an image smaller, from `source` to `target`; None if Pillow has to do it.

    It returns pixels (height, width, 1 or 3 channels). For larger targets and very wide images, the library would take
    much memory.
    """
    smaller = source[0] >= target[0] and source[1] >= target[1] and source[0] <= MAX_WIDTH
    return library_shrink(resample) if smaller else None


@cache
def library_shrink(resample: str) -> Shrink | None:
    """Return the library's function; None, with a warning, if it is missing or its result is not like Pillow's."""
    if resample not in FILTERS:
        return None
    known = np.random.default_rng(1).integers(0, 2, (47, 61), np.uint8) * 255
    expected = np.asarray(Image.fromarray(known).resize((23, 19), Image.Resampling[resample.upper()]))
    try:
        shrink = load_shrink(FILTERS[resample])
        small = shrink(lambda top, bottom: known[top:bottom].tobytes(), (61, 47), (23, 19))
        difference = np.abs(small[:, :, 0].astype(int) - expected).max()
        if difference <= MOST_DIFFERENCE:
            return shrink
        problem = f"it resizes a known image differently, by {difference} levels"
    except Exception as error:
        problem = str(error)
    log.warning("Pillow resizes images, which takes longer, since cykooz-resizer can't be used: %s", problem)
    return None


def load_shrink(name: str) -> Shrink:
    """Return a function that shrinks gray or RGB images with the library's filter `name`.

    It uses buffers of bytes only. The library can also read Pillow's images, but from memory whose layout it assumes.
    """
    from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer  # noqa: PLC0415

    options = ResizeOptions(ResizeAlg.convolution(FilterType[name]))

    def resized(image: ImageData, kind: PixelType, size: Size) -> ImageData:
        small = ImageData(*size, kind)
        Resizer().resize(image, small, options)  # a new one, since another thread may be using it
        return small

    def shrink(rows: Rows, source: Size, target: Size) -> Pixels:
        """Resize the rows first and then the columns, as Pillow does: between the two, values are clipped."""
        (width, height), (target_width, target_height) = source, target
        step = min(height, max(1, STRIP_PIXELS // width))
        narrow = []
        for top in range(0, height, step):
            count = min(step, height - top)
            pixels = rows(top, top + count)
            kind = PixelType.U8 if len(pixels) == width * count else PixelType.U8x3
            narrow.append(resized(ImageData(width, count, kind, pixels), kind, (target_width, count)))
        if len(narrow) > 1:
            narrow = [ImageData(target_width, height, kind, b"".join(strip.get_buffer() for strip in narrow))]
        small = resized(narrow[0], kind, target).get_buffer()
        return np.frombuffer(small, np.uint8).reshape(target_height, target_width, -1)

    return shrink
