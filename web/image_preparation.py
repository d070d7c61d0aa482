"""A client's file becomes pixels: opened within limits, laid onto white, resized, turned upright.

POST /predict and run_model_server.py --check both go through here, so that they say the same of the same file.

A decoded image takes four bytes for each pixel, a quarter of a gigabyte for a large one. So it is kept only once: what
is done to its colours is done to a strip of rows after the other, each of which is made narrow at once.
"""

import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import IO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

import settings
from helpers import Pixels, ServiceError, megapixels
from web.errors import WebError
from web.image_checks import END_OF_JPEG, MAX_EXIF_BYTES, MAX_SHRUNK, MAX_SIDE, TooManyPixels
from web.image_formats import IN_FULL, UNFINISHED, NotTaken, open_frugally

log = logging.getLogger(__name__)

WHITE = (255, 255, 255)
STRIP_PIXELS = 2**20  # of an image, whose colours are made at once
# What decoding takes at most for each pixel, measured: a WebP is there three times, a HEIC in its own colours too.
BYTES_PER_PIXEL = {"JPEG": 4, "PNG": 6, "GIF": 5, "BMP": 4, "TIFF": 8, "WEBP": 14, "HEIF": 14, "AVIF": 14}
# A JPEG is decoded no smaller than this many times the target, so that the resize behind it still decides most of a
# pixel. Measured on 12 photos against a full decode, the median change of a probability is 0.01 here, 0.005 at
# 2, and 0.02 at 1. A JPEG of 800x600, which is decoded at a half, takes three times as long at 2.
SHRINK_TO = 1.3
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)
GREYS = ("1", "L")
GDAL_NODATA = 42113  # the TIFF tag with the value that stands for none
MAP_TAGS = {33550, 33922, 34264, 34735}  # which a GeoTIFF has
USUAL_NODATA = (-9999.0, -32768.0)  # in maps whose writer forgot to say so
BEYOND = 3.4e38  # a float so large is none either

# Pillow's own guard against decompression bombs; ours below it has an exact limit and an answer of its own.
Image.MAX_IMAGE_PIXELS = settings.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class MissingImage(WebError):
    """The form has no file named `image`."""

    status, code = 400, "missing_image"


class BadImage(WebError):
    """The file is not an image that can be decoded."""

    status, code = 400, "bad_image"


class TooLarge(WebError):
    """Too many bytes or pixels."""

    status, code = 413, "too_large"


class Look(NamedTuple):
    """How the values of an image are seen: `low` as black, `high` as white, those of `nodata` as none."""

    low: float = 0.0
    high: float = 65535.0
    nodata: tuple[float, ...] = ()
    opaque: bool = False  # whatever its alpha says


def open_image(stream: IO[bytes]) -> Image.Image:
    """Return the image in `stream`, its header read and nothing decoded. Raises MissingImage, BadImage, TooLarge.

    A BadImage says why as its __cause__.
    """
    if stream.seek(0, io.SEEK_END) == 0:
        raise MissingImage("The file in the form field `image` is empty, so send an image.")
    stream.seek(0)
    try:
        image = open_frugally(stream.read(), settings.IMAGE_FORMATS.split(","), settings.MAX_IMAGE_PIXELS)
    except (Image.DecompressionBombError, TooManyPixels) as error:
        raise too_many_pixels("") from error
    except NotTaken as error:
        what = f"This is {error}" if str(error) else "This is not an image that can be read"
        raise BadImage(f"{what}, so send a file of {formats()}.") from error
    except Exception as error:  # hostile headers raise anything
        raise BadImage(f"This is not an image that can be read, so send a file of {formats()}.") from error
    if max(image.size) > MAX_SIDE:
        raise TooLarge(f"The image has a side of more than {MAX_SIDE:,} pixels, so send it smaller.")
    return image


def formats() -> str:
    """Return the formats that are taken, for people."""
    *most, last = settings.IMAGE_FORMATS.split(",")
    return f"{', '.join(most)} or {last}" if most else last


def bytes_to_decode(image: Image.Image, target: tuple[int, int]) -> int:
    """Return how many bytes it takes to decode `image` for `target` (width, height). Raises BadImage, TooLarge.

    A large JPEG is decoded at a half, a quarter or an eighth, which takes a fraction of the memory and time; never
    below SHRINK_TO times the target, in either direction, since EXIF may turn it. What counts are the pixels that are
    decoded.
    """
    whole = image.width * image.height
    least = math.ceil(SHRINK_TO * max(target))
    try:
        image.draft(None, (least, least))
    except Exception as error:
        raise damaged() from error
    decoded = image.width * image.height
    in_full = image.info.get(IN_FULL, 0)
    if max(whole if in_full else decoded, whole / MAX_SHRUNK) > settings.MAX_IMAGE_PIXELS:
        raise too_many_pixels(image.format or "")
    taken = decoded * BYTES_PER_PIXEL[image.format or "PNG"] + int(whole * in_full)
    if taken > settings.MAX_DECODE_BYTES:
        limit = f"{settings.MAX_DECODE_BYTES / 1e6:g} MB of memory"
        raise TooLarge(f"Decoding this image takes more than {limit}, so send it smaller, or as a baseline JPEG.")
    return taken


def prepare_image(image: Image.Image, target: tuple[int, int], channels: int = 3) -> Pixels:
    """Return `image` as pixels (height, width, channels) of IMAGE_DTYPE, in 0 to 255, at `target` (width, height).

    It is turned upright by its EXIF orientation, laid onto white where it is transparent, and its first frame counts.
    Raises TooLarge when it has too many pixels, and BadImage when it can't be decoded, which says why as its __cause__.
    """
    bytes_to_decode(image, target)
    try:
        if image.info.get(UNFINISHED):
            finish(image)
        image.load()
        orientation = orientation_of(image)
        size = target[::-1] if orientation in SIDEWAYS else target
        image = resized(image, size, "RGB" if channels == 3 else "L", look_of(image))
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
    except Image.DecompressionBombError as error:
        raise too_many_pixels("") from error
    except Exception as error:  # hostile contents raise anything, of which nothing is the client's to read
        raise damaged() from error
    return np.asarray(image, dtype=settings.IMAGE_DTYPE).reshape(target[1], target[0], channels)


def finish(image: Image.Image) -> None:
    """Put the marker of its end behind a JPEG that lacks it, where all of its pixels are there.

    Pillow refuses such a file, and with the marker it would take one that lacks pixels too: libjpeg only warns of that,
    and fills them with grey. simplejpeg makes an error of a warning.
    """
    import simplejpeg  # noqa: PLC0415 - which few files need

    file = cast(io.BytesIO, image.fp)  # type: ignore[attr-defined]
    colours = {"L": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB")
    try:
        simplejpeg.decode_jpeg(file.getvalue() + END_OF_JPEG, colours, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        log.debug("without its end, and without pixels: %s", error)
        return  # Pillow says what is missing, and takes some that are followed by rubbish
    at = file.tell()
    file.seek(0, io.SEEK_END)
    file.write(END_OF_JPEG)
    file.seek(at)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where it can't be read."""
    if len(image.info.get("exif") or b"") > MAX_EXIF_BYTES:
        return 1  # it would be taken apart in Python
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # a camera's odd EXIF is no reason to refuse a good photo
        log.debug("EXIF ignored: %r", error)
        return 1
    return orientation if orientation in TURNS else 1


def resized(image: Image.Image, size: tuple[int, int], mode: str, look: Look) -> Image.Image:
    """Return `image`, of any mode that Pillow knows, in `size` (width, height) and `mode`, RGB or L.

    As Pillow does it, the rows are resized first, and then the columns. So rows can be taken strip by strip.
    """
    width, height = size
    if width > image.width and height < image.height and width * image.height > STRIP_PIXELS:
        # A tower would become wide before it becomes low: 500,000 rows of half a gigabyte.
        lying = resized(image.transpose(Image.Transpose.TRANSPOSE), (height, width), mode, look)
        return lying.transpose(Image.Transpose.TRANSPOSE)
    resample = Image.Resampling[settings.IMAGE_RESAMPLE.upper()]
    if image.width * image.height <= STRIP_PIXELS or image.mode == mode:
        return coloured(image, look, mode).resize(size, resample).convert(mode)
    narrow = None
    for top, strip in strips(image):
        strip = coloured(strip, look, mode).resize((width, strip.height), resample)  # noqa: PLW2901
        narrow = narrow or Image.new(strip.mode, (width, image.height))
        narrow.paste(strip, (0, top))
    assert narrow
    return narrow.resize(size, resample).convert(mode)


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the rows of `image` in strips of STRIP_PIXELS, each with the number of its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def look_of(image: Image.Image) -> Look:
    """Return how `image` is seen.

    Its 16 bits are scaled by their range. Floats, 32 bits and maps have no range of their own, so what is there, from
    the darkest to the brightest value, is stretched to it.
    """
    if image.format == "BMP" and image.mode == "RGBA":  # as clipboards write it, who mean nothing by its alpha
        return Look(opaque=image.getchannel("A").getextrema() == (0, 0))
    if not image.mode.startswith(("I", "F")):
        return Look()
    nodata = nodata_of(image)
    if image.mode.startswith("I;16") and not nodata:
        return Look()
    low, high = math.inf, -math.inf
    for _, strip in strips(image):
        values = np.asarray(strip)
        real = is_real(values, nodata)
        if real.any():
            low, high = min(low, float(values[real].min())), max(high, float(values[real].max()))
    return Look(low, high, nodata) if low <= high else Look(0.0, 0.0, nodata)


def nodata_of(image: Image.Image) -> tuple[float, ...]:
    """Return the values of a map that stand for none: by its tag, or the usual ones where it has no such tag."""
    tags = getattr(image, "tag_v2", {})
    try:
        return (float(tags[GDAL_NODATA]),)
    except (KeyError, ValueError, TypeError):
        return USUAL_NODATA if MAP_TAGS & set(tags) else ()


def is_real(values: Pixels, nodata: tuple[float, ...]) -> npt.NDArray[np.bool]:
    """Whether each of `values` is one, and not infinite or a mark that there is none."""
    real = np.abs(values) < BEYOND if values.dtype.kind == "f" else np.ones(values.shape, np.bool)
    for value in nodata:
        real &= values != value
    return cast(npt.NDArray[np.bool], real)


def coloured(image: Image.Image, look: Look, mode: str) -> Image.Image:
    """Return `image`, of any mode that Pillow knows, in `mode` (RGB or L). Grey stays L, a third of the work."""
    if image.mode == "P" and image.palette is None:
        image = image.copy()  # which gets a palette of greys
    if image.mode.startswith(("I", "F")):
        image = to_eight_bits(image, look)
    if image.has_transparency_data and not look.opaque:
        paper, image = Image.new("RGB", image.size, WHITE), image.convert("RGBA")
        paper.paste(image, mask=image)
        image = paper
    mode = "L" if image.mode in GREYS else mode
    return image if image.mode == mode else image.convert(mode)


def to_eight_bits(image: Image.Image, look: Look) -> Image.Image:
    """Return a greyscale `image` of 16 or 32 bits, or of floats, in 8 bits. Where it has no value it is black."""
    values = np.asarray(image)
    none = ~is_real(values, look.nodata) & (values != np.inf)
    scaled = (values.astype(np.float64) - look.low) * 255 / max(look.high - look.low, 1e-9)
    scaled[none] = 0
    return Image.fromarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))


def too_many_pixels(form: str) -> TooLarge:
    """Return the error for an image beyond MAX_IMAGE_PIXELS."""
    how = "" if form == "JPEG" else ", or as a baseline JPEG, which is decoded at a smaller size"
    return TooLarge(
        f"The image has more than {megapixels(settings.MAX_IMAGE_PIXELS)} to decode, so send it smaller{how}."
    )


def damaged() -> BadImage:
    """Return the error for an image that has a good header and bad pixels."""
    return BadImage("The image is damaged or cut off and can't be decoded, so send it again whole.")


def reason(error: ServiceError) -> str:
    """Return why a file is refused, as its library says it, in a line for the log."""
    cause = error.__cause__
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", str(cause)) if cause else str(error)
    text = "".join(sign if sign.isprintable() else "?" for sign in text[:200])
    return text or type(cause).__name__
