"""A client's file becomes pixels: opened within limits, turned upright, laid onto white, resized.

POST /predict and run_model_server.py --check both go through here, so that they say the same of the same file.
"""

import logging
import warnings
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

import settings
from helpers import Pixels, ServiceError, megapixels
from image_checks import FORMATS, MAX_EXIF_BYTES, open_frugally

log = logging.getLogger(__name__)

WHITE = (255, 255, 255, 255)

# Pixels of a side. Pillow keeps a pointer for each row, and the resize a table of 32 bytes for each pixel of the longer
# side: 1 x 33,000,000 took a gigabyte, of a file of 69 bytes. A long strip of a map or a scan is well below this.
MAX_SIDE = 500_000

# Pillow's own guard against decompression bombs; ours below it has an exact limit and an answer of its own.
Image.MAX_IMAGE_PIXELS = settings.MAX_IMAGE_PIXELS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class MissingImage(ServiceError):
    """The form has no file named `image`."""

    status, code = 400, "missing_image"


class BadImage(ServiceError):
    """The file is not an image that can be decoded."""

    status, code = 400, "bad_image"


class TooLarge(ServiceError):
    """Too many bytes or pixels."""

    status, code = 413, "too_large"


def open_image(stream: IO[bytes]) -> Image.Image:
    """Return the image in `stream`, its header read and nothing decoded. Raises MissingImage, BadImage, TooLarge."""
    data = stream.read()
    if not data:
        raise MissingImage("The file in the form field `image` is empty, so send an image.")
    try:
        image = open_frugally(data)
    except Image.DecompressionBombError as error:
        raise too_many_pixels() from error
    except Exception as error:  # hostile headers raise anything
        log.info("bad image: %r", error)
        raise BadImage(f"This is not an image that can be read, so send a {', '.join(FORMATS)} file.") from error
    if image.width * image.height > settings.MAX_IMAGE_PIXELS:
        raise too_many_pixels()
    if max(image.size) > MAX_SIDE:
        raise TooLarge(f"The image has a side of more than {MAX_SIDE} pixels, so send it smaller.")
    return image


def prepare_image(image: Image.Image, target: tuple[int, int], channels: int = 3) -> Pixels:
    """Return `image` as pixels (height, width, channels) of IMAGE_DTYPE, in 0 to 255, at `target` (width, height).

    It is turned upright by its EXIF orientation, laid onto white where it is transparent, and its first frame counts.
    Raises BadImage when it can't be decoded, TooLarge when it turns out larger than its header said.
    """
    try:
        # A large JPEG is decoded at a half, a quarter or an eighth, which takes a fraction of the time; never below
        # what is asked for, in either direction, since EXIF may turn it.
        image.draft(None, (max(target), max(target)))
        image.load()
        image = to_colour(upright(image), channels)
        image = image.resize(target, Image.Resampling[settings.IMAGE_RESAMPLE.upper()])
    except Image.DecompressionBombError as error:
        raise too_many_pixels() from error
    except Exception as error:  # hostile contents raise anything, of which nothing is the client's to read
        log.info("bad image: %r", error)
        raise BadImage("The image is damaged or cut off and can't be decoded, so send it again whole.") from error
    return np.asarray(image, dtype=settings.IMAGE_DTYPE).reshape(target[1], target[0], channels)


def upright(image: Image.Image) -> Image.Image:
    """Return `image` turned as its EXIF orientation says, or as it is where that can't be read."""
    if len(image.info.get("exif", b"")) > MAX_EXIF_BYTES:
        return image  # it would be taken apart in Python
    try:
        ImageOps.exif_transpose(image, in_place=True)  # without that it copies what is upright
    except Exception as error:  # a camera's odd EXIF is no reason to refuse a good photo
        log.info("EXIF ignored: %r", error)
    return image


def to_colour(image: Image.Image, channels: int) -> Image.Image:
    """Return `image`, of any mode that Pillow knows, as RGB (or grey where it is to have 1 channel)."""
    if image.mode == "P" and image.palette is None:
        image = image.copy()  # which gets a palette of greys
    if image.mode.startswith(("I", "F")):
        image = to_eight_bits(image)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, WHITE)
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Return a greyscale `image` of 16 or 32 bits, or of floats, in 8 bits.

    16 bits are scaled by their range. The others have no range of their own, so what is there, from the darkest to the
    brightest value, is stretched to it.
    """
    values = np.array(image, dtype=np.float32)
    real = np.isfinite(values)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else extremes(values, real)
    scale = 255 / max(high - low, 1e-9)
    # In place: a photo's worth of floats is hundreds of megabytes. Scaled before moved, so that nothing overflows.
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    values *= scale
    values -= low * scale
    np.rint(values, out=values)
    return Image.fromarray(values.astype(np.uint8))


def extremes(values: Pixels, real: npt.NDArray[np.bool]) -> tuple[float, float]:
    """Return the least and the greatest of `values` where `real` is true; zeros where it nowhere is."""
    if not real.any():
        return 0.0, 0.0
    return float(np.min(values, where=real, initial=np.inf)), float(np.max(values, where=real, initial=-np.inf))


def too_many_pixels() -> TooLarge:
    """Return the error for an image beyond MAX_IMAGE_PIXELS."""
    return TooLarge(f"The image has more than {megapixels(settings.MAX_IMAGE_PIXELS)}, so send it smaller.")
