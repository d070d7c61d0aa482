"""Convert an image of any Pillow mode to 8-bit RGB or gray, and resize it.

A decoded image takes four bytes per pixel, a quarter of a gigabyte for a large one. To hold only one copy of it, each
strip of rows is converted and resized to its final width before the next.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

import settings
from helpers import Pixels
from web.image_resizing import shrinker

WHITE = (255, 255, 255)
STRIP_PIXELS = 2**20
GRAYS = ("1", "L")
GDAL_NODATA = 42113  # the TIFF tag with the value that means no data
MAP_TAGS = {33550, 33922, 34264, 34735}  # TIFF tags of a GeoTIFF
USUAL_NODATA = (-9999.0, -32768.0)  # values that mean no data in maps without the tag
MAX_FLOAT = 3.4e38  # a float this large also means no data


class Rendering(NamedTuple):
    """How pixel values become gray levels: `low` and `nodata` become black, `high` white."""

    low: float = 0.0
    high: float = 65535.0
    nodata: tuple[float, ...] = ()
    opaque: bool = False  # whether to ignore the alpha


def resize(image: Image.Image | Pixels, size: tuple[int, int], mode: str, rendering: Rendering) -> Pixels:
    """Return `image`, or its pixels (height, width, channels), as pixels in `size` (width, height).

    They have one channel if `mode` is L, and three if it is RGB.
    """
    channels = 3 if mode == "RGB" else 1
    if isinstance(image, np.ndarray) and image.shape[2] not in (1, channels):
        image = Image.fromarray(image)
    source = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
    if shrink := shrinker(source, size, settings.IMAGE_RESAMPLE):
        small = shrink(rows_of(image, mode, rendering), source, size)
        return small if small.shape[2] == channels else np.repeat(small, channels, axis=2)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
    return np.asarray(resize_with_pillow(image, size, mode, rendering)).reshape(size[1], size[0], channels)


def rows_of(image: Image.Image | Pixels, mode: str, rendering: Rendering) -> Callable[[int, int], bytes]:
    """Return a function that returns the rows from one number up to another, gray or in `mode`, as bytes."""
    if isinstance(image, np.ndarray):
        return lambda top, bottom: image[top:bottom].tobytes()

    def rows(top: int, bottom: int) -> bytes:
        strip = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
        return convert(strip, mode, rendering).tobytes()

    return rows


def resize_with_pillow(image: Image.Image, size: tuple[int, int], mode: str, rendering: Rendering) -> Image.Image:
    """Return `image` in `size` (width, height) and `mode` (RGB or L).

    Pillow resizes the rows first and then the columns, so strips of rows give the same result.
    """
    width, height = size
    if width > image.width and height < image.height and width * image.height > STRIP_PIXELS:
        # A tall narrow image would be widened before it is shortened: 500,000 rows would take half a gigabyte.
        turned = resize_with_pillow(image.transpose(Image.Transpose.TRANSPOSE), (height, width), mode, rendering)
        return turned.transpose(Image.Transpose.TRANSPOSE)
    resample = Image.Resampling[settings.IMAGE_RESAMPLE.upper()]
    if image.width * image.height <= STRIP_PIXELS or image.mode == mode:
        return convert(image, mode, rendering).resize(size, resample).convert(mode)
    narrow = None
    for top, strip in strips(image):
        strip = convert(strip, mode, rendering).resize((width, strip.height), resample)  # noqa: PLW2901
        narrow = narrow or Image.new(strip.mode, (width, image.height))
        narrow.paste(strip, (0, top))
    assert narrow
    return narrow.resize(size, resample).convert(mode)


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield `image` in strips of STRIP_PIXELS, each with the number of its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def rendering_of(image: Image.Image) -> Rendering:
    """Return how to render `image`.

    16 bits are scaled by their full range; floats, 32 bits and maps from their lowest to their highest value.
    """
    if image.format == "BMP" and image.mode == "RGBA":  # clipboards write a meaningless alpha of zeros
        return Rendering(opaque=image.getchannel("A").getextrema() == (0, 0))
    if not image.mode.startswith(("I", "F")):
        return Rendering()
    nodata = nodata_of(image)
    if image.mode.startswith("I;16") and not nodata:
        return Rendering()
    low, high = math.inf, -math.inf
    for _, strip in strips(image):
        values = np.asarray(strip)
        has_data = data_mask(values, nodata)
        if has_data.any():
            low, high = min(low, float(values[has_data].min())), max(high, float(values[has_data].max()))
    return Rendering(low, high, nodata) if low <= high else Rendering(0.0, 0.0, nodata)


def nodata_of(image: Image.Image) -> tuple[float, ...]:
    """Return the values that mean no data: from the image's tag, or the usual ones if it is a map without the tag."""
    tags = getattr(image, "tag_v2", {})
    try:
        return (float(tags[GDAL_NODATA]),)
    except (KeyError, ValueError, TypeError):
        return USUAL_NODATA if MAP_TAGS & set(tags) else ()


def data_mask(values: Pixels, nodata: tuple[float, ...]) -> npt.NDArray[np.bool]:
    """Return which of `values` are finite data."""
    mask = np.abs(values) < MAX_FLOAT if values.dtype.kind == "f" else np.ones(values.shape, np.bool)
    for value in nodata:
        mask &= values != value
    return cast(npt.NDArray[np.bool], mask)


def convert(image: Image.Image, mode: str, rendering: Rendering) -> Image.Image:
    """Return `image` in `mode` (RGB or L), with transparent parts on white. Gray stays L, for a third of the work."""
    if image.mode == "P" and image.palette is None:
        image = image.copy()  # the copy gets a palette of grays
    if image.mode.startswith(("I", "F")):
        image = to_eight_bits(image, rendering)
    if image.has_transparency_data and not rendering.opaque:
        paper, image = Image.new("RGB", image.size, WHITE), image.convert("RGBA")
        paper.paste(image, mask=image)
        image = paper
    mode = "L" if image.mode in GRAYS else mode
    return image if image.mode == mode else image.convert(mode)


def to_eight_bits(image: Image.Image, rendering: Rendering) -> Image.Image:
    """Return a grayscale `image` of 16 bits, 32 bits or floats in 8 bits. Values that mean no data become black."""
    values = np.asarray(image)
    scaled = (values.astype(np.float64) - rendering.low) * 255 / max(rendering.high - rendering.low, 1e-9)
    scaled[~data_mask(values, rendering.nodata) & (values != np.inf)] = 0
    return Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))
