"""Turn a client's file into the pixels that the model gets: open it, decode it, turn it upright, resize it.

POST /predict and run_model_server.py --check both use this, so they treat a file alike.
"""

import io
import logging
import math
import re
from collections.abc import Callable
from functools import partial
from typing import IO, cast

import numpy as np
from PIL import ExifTags, Image

import settings
from helpers import Pixels, ServiceError, megapixels
from web.errors import WebError, printable
from web.image_checks import MAX_EXIF_BYTES, TooManyPixels
from web.image_colors import rendering_of, resize
from web.image_formats import BYTES_AT_ANY_SCALE, LACKS_END, UnsupportedFormat, open_safely
from web.png_pixels import decode_png

log = logging.getLogger(__name__)

MAX_SIDE = 500_000  # pixels: Pillow keeps a pointer per row, and its resize a table per column
MAX_SHRINK = 4  # times MAX_IMAGE_PIXELS that a JPEG may have if it is decoded smaller: phones make 200 megapixels
# The most bytes per pixel that decoding takes, measured. A WebP is in memory three times, a HEIC also in YCbCr.
BYTES_PER_PIXEL = {"JPEG": 4, "PNG": 6, "GIF": 5, "BMP": 4, "TIFF": 8, "WEBP": 14, "HEIF": 14, "AVIF": 14}
# A JPEG is decoded at no less than this many times the target, so that the resize determines most of each pixel. On 12
# photos, compared with a full decode, probabilities change by 0.01 (median) at 1.3, 0.005 at 2, and 0.02 at 1. But at
# 2, a JPEG of 800x600 could not be decoded at half its size, and would take three times as long.
SHRINK_TO = 1.3
TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: np.asarray, 2: np.fliplr, 3: partial(np.rot90, k=2), 4: np.flipud, 5: lambda pixels: pixels.swapaxes(0, 1),
    6: partial(np.rot90, k=-1), 7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)
JPEG_END = b"\xff\xd9"

# Pillow raises an error above twice this number. The exact limit is in bytes_to_decode().
Image.MAX_IMAGE_PIXELS = settings.MAX_IMAGE_PIXELS


class MissingImage(WebError):
    """The request has no image, or an empty one."""

    status, code = 400, "missing_image"


class BadImage(WebError):
    """The file is not an image that can be decoded; the error's __cause__ says why."""

    status, code = 400, "bad_image"


class TooLarge(WebError):
    """Too many bytes or pixels."""

    status, code = 413, "too_large"


def open_image(stream: IO[bytes] | io.BufferedIOBase) -> Image.Image:
    """Return the image in `stream`, not yet decoded. Raises MissingImage, BadImage, TooLarge."""
    if stream.seek(0, io.SEEK_END) == 0:
        raise MissingImage("The file in the form field `image` is empty, so send an image.")
    stream.seek(0)
    try:
        image = open_safely(stream.read(), settings.IMAGE_FORMATS.split(","), settings.MAX_IMAGE_PIXELS)
    except (Image.DecompressionBombError, TooManyPixels) as error:
        raise too_many_pixels("") from error
    except UnsupportedFormat as error:
        raise unreadable(str(error)) from error
    except Exception as error:  # a hostile header can raise anything
        raise unreadable() from error
    if max(image.size) > MAX_SIDE:
        raise TooLarge(f"The image has a side of more than {MAX_SIDE:,} pixels, so send a smaller one.")
    return image


def bytes_to_decode(image: Image.Image, target: tuple[int, int]) -> int:
    """Return how many bytes of memory it takes to decode `image` for `target` (width, height).

    Makes Pillow decode a large JPEG at a half, a quarter or an eighth, which takes a fraction of the memory and time.
    Both sides stay at least SHRINK_TO times the longer side of the target, since EXIF may turn the image. The limits
    apply to the pixels that are decoded. Raises BadImage, TooLarge.
    """
    full = image.width * image.height
    least = math.ceil(SHRINK_TO * max(target))
    try:
        image.draft(None, (least, least))
    except Exception as error:
        raise damaged() from error
    decoded = image.width * image.height
    at_any_scale = image.info.get(BYTES_AT_ANY_SCALE, 0)
    if max(full if at_any_scale else decoded, full / MAX_SHRINK) > settings.MAX_IMAGE_PIXELS:
        raise too_many_pixels(image.format or "")
    size = decoded * BYTES_PER_PIXEL[image.format or "PNG"] + int(full * at_any_scale)
    if size > settings.MAX_DECODE_BYTES:
        limit = f"{settings.MAX_DECODE_BYTES / 1e6:g} MB of memory"
        raise TooLarge(f"Decoding this image takes more than {limit}, so send a smaller one, or a baseline JPEG.")
    return size


def prepare_image(image: Image.Image, target: tuple[int, int], channels: int = 3) -> Pixels:
    """Return `image` as pixels (height, width, channels) of IMAGE_DTYPE, 0 to 255, at `target` (width, height).

    Uses the first frame, turned upright by its EXIF orientation, with transparent parts on white. Raises TooLarge, and
    BadImage if it can't be decoded.
    """
    bytes_to_decode(image, target)
    try:
        if image.info.get(LACKS_END):
            append_end(image)
        decoded = decode_png(image)
        if decoded is None:
            image.load()
        orientation = orientation_of(image)
        size = target[::-1] if orientation in SIDEWAYS else target
        pixels = resize(
            image if decoded is None else decoded, size, "RGB" if channels == 3 else "L", rendering_of(image)
        )
    except Image.DecompressionBombError as error:
        raise too_many_pixels("") from error
    except Exception as error:  # hostile pixels can raise anything
        raise damaged() from error
    return TURNS[orientation](pixels).astype(settings.IMAGE_DTYPE, order="C", copy=False)


def append_end(image: Image.Image) -> None:
    """Append the missing end marker to a JPEG, if all of its pixels are there.

    Pillow refuses a JPEG without the marker. If it were always appended, Pillow would also accept a JPEG that lacks
    pixels: libjpeg only warns and fills them with gray. simplejpeg turns that warning into an error.
    """
    import simplejpeg  # noqa: PLC0415 - few files need it

    file = cast(io.BytesIO, image.fp)  # type: ignore[attr-defined]
    colors = {"L": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB")
    try:
        simplejpeg.decode_jpeg(file.getvalue() + JPEG_END, colors, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        log.debug("JPEG lacks its end and pixels: %s", error)
        return  # Pillow reports the missing pixels, or finds an end marker in the data after the image
    at = file.tell()
    file.seek(0, io.SEEK_END)
    file.write(JPEG_END)
    file.seek(at)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if it is missing or can't be read."""
    if len(image.info.get("exif") or b"") > MAX_EXIF_BYTES:
        return 1  # parsing it in Python would take too long
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception as error:  # a good photo may have a damaged EXIF
        log.debug("EXIF ignored: %r", error)
        return 1
    return orientation if orientation in TURNS else 1


def unreadable(kind: str = "") -> BadImage:
    """Return the error for a file that is not a supported image; `kind` says what it is, if known."""
    *most, last = settings.IMAGE_FORMATS.split(",")
    formats = f"{', '.join(most)} or {last}" if most else last
    return BadImage(f"This is {kind or 'not an image that can be read'}, so send a file of {formats}.")


def too_many_pixels(form: str) -> TooLarge:
    """Return the error for an image beyond MAX_IMAGE_PIXELS."""
    how = "" if form == "JPEG" else ", or a baseline JPEG, which is decoded at a smaller size"
    limit = megapixels(settings.MAX_IMAGE_PIXELS)
    return TooLarge(f"The image has more than {limit} to decode, so send a smaller one{how}.")


def damaged() -> BadImage:
    """Return the error for an image whose header can be read, but not its pixels."""
    return BadImage("The image is damaged or cut off and can't be decoded, so send the whole file again.")


def reason(error: ServiceError) -> str:
    """Return why a file is refused, as one printable line for the log: what the library said, if one failed."""
    cause = error.__cause__
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", str(cause)) if cause else str(error)
    return printable(text, 200) or type(cause).__name__
