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
STRIP_PIXELS = 2**18  # small enough for the processor's cache, and for memory that is used again
MOST_DIFFERENCE = 2  # levels, from Pillow's result for a known image

Size = tuple[int, int]  # width, height
Resize = Callable[[bytes, Size, Size], bytes]


def can_shrink(source: Size, target: Size, resample: str) -> bool:
    """Return whether shrink() can be used. For larger targets and very wide images, the library takes much memory."""
    smaller = source[0] >= target[0] and source[1] >= target[1] and source[0] <= MAX_WIDTH
    return smaller and fast_resize(resample) is not None


def shrink(rows: Callable[[int, int], bytes], source: Size, target: Size, resample: str) -> Pixels:
    """Return the image resized from `source` to `target` as pixels (height, width, 1 or 3 channels).

    `rows` returns the pixels of the rows from one number up to another. Only if can_shrink().
    """
    resize = fast_resize(resample)
    assert resize
    return in_two_passes(resize, rows, source, target)


def in_two_passes(resize: Resize, rows: Callable[[int, int], bytes], source: Size, target: Size) -> Pixels:
    """Resize the rows first and then the columns, as Pillow does: values are clipped in between, so the order matters."""
    (width, height), (target_width, target_height) = source, target
    step = max(1, STRIP_PIXELS // width)
    strips = []
    for top in range(0, height, step):
        count = min(step, height - top)
        strips.append(resize(rows(top, top + count), (width, count), (target_width, count)))
    small = resize(b"".join(strips), (target_width, height), target)
    return np.frombuffer(small, np.uint8).reshape(target_height, target_width, -1)


@cache
def fast_resize(resample: str) -> Resize | None:
    """Return the library's resize; None, with a warning, if it is missing or its result is not like Pillow's."""
    if resample not in FILTERS:
        return None
    known = np.random.default_rng(1).integers(0, 2, (47, 61), np.uint8) * 255
    expected = np.asarray(Image.fromarray(known).resize((23, 19), Image.Resampling[resample.upper()]))
    try:
        resize = load_resize(FILTERS[resample])
        small = in_two_passes(resize, lambda top, bottom: known[top:bottom].tobytes(), (61, 47), (23, 19))
        difference = np.abs(small[:, :, 0].astype(int) - expected).max()
        if difference <= MOST_DIFFERENCE:
            return resize
        problem = f"it resizes a known image differently, by {difference} levels"
    except Exception as error:
        problem = str(error)
    log.warning("Pillow resizes images, which takes longer, since cykooz-resizer can't be used: %s", problem)
    return None


def load_resize(name: str) -> Resize:
    """Return a function that resizes gray or RGB pixels with the library's filter `name`.

    It uses buffers of bytes only. The library can also read Pillow's images, but from memory whose layout it assumes.
    """
    from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer  # noqa: PLC0415

    options = ResizeOptions(ResizeAlg.convolution(FilterType[name]))

    def resize(pixels: bytes, source: Size, target: Size) -> bytes:
        kind = PixelType.U8 if len(pixels) == source[0] * source[1] else PixelType.U8x3
        small = ImageData(*target, kind)
        Resizer().resize(ImageData(*source, kind, pixels), small, options)
        return bytes(small.get_buffer())

    return resize
