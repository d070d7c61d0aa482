"""Open an image of a supported format without decoding it, or say what else the file is."""

import io
import math
import re
import warnings
from collections.abc import Callable, Collection
from typing import cast

from PIL import AvifImagePlugin, Image, TiffTags
from PIL.JpegImagePlugin import JpegImageFile
from PIL.WebPImagePlugin import WebPImageFile

from web.heif_checks import strip_heif
from web.image_checks import Bomb, strip_gif, strip_png, strip_tiff, strip_webp
from web.jpeg_checks import strip_jpeg
from web.png_pixels import IS_PLAIN, is_plain

MAX_READS = 50_000  # calls of read() for a header; Pillow parses it in Python, a microsecond for each
MAX_RLE_PIXELS = 2**21  # of a run-length encoded BMP, which Pillow decodes in Python: full HD
RLE = (1, 2)  # values of a BMP's compression field

HEIF = "HEIC or AVIF"  # the two share their signatures
SIGNATURES = [
    (re.compile(pattern, re.DOTALL), form)
    for pattern, form in (
        (rb"\xff\xd8\xff", "JPEG"), (rb"\x89PNG\r\n\x1a\n", "PNG"), (rb"GIF8[79]a", "GIF"), (rb"RIFF....WEBP", "WEBP"),
        (rb"BM", "BMP"), (rb"II\*\0|II\+\0|MM\0\*|MM\0\+|II\0\*|MM\*\0", "TIFF"),
        (rb"....ftyp(?:hei[cxms]|hev[cxms]|mif[12]|msf1|avi[fs])", HEIF),
    )
]  # fmt: skip
# What may precede the first element of XML or HTML. The pattern never backtracks, since that could take minutes.
BLANK = rb"(?:\xef\xbb\xbf)?(?>\s+|<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE svg[^>]*>)*+"
# Other files that people send, and their names for the error message.
OTHER_FILES = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), name)
    for pattern, name in (
        (rb"%PDF", "a PDF document"), (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
        (BLANK + rb"<(?:svg:)?svg[\s/>]", "an SVG drawing"),
        (rb"\x1f\x8b", "a gzip archive"), (rb"PK[\x03\x05\x07]", "a ZIP archive"), (rb"8BPS", "a Photoshop document"),
        (rb"\0\0\0\x0cJXL |\xff\x0a", "a JPEG XL image"), (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 image"),
        (rb"\0\0[\x01\x02]\0", "an icon"), (rb"....ftypcrx|FUJIFILMCCD-RAW|IIU\0|IIRO|\0MRM", "a camera's raw file"),
        (rb"....ftyp|....(?:moov|mdat|wide)|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01[\xb3\xba]", "a video"),
        (rb"#\?RADIANCE|v/1\x01|P[1-7F]\s|\xb1\x68\xde\x3a|DDS |qoif", "an image of another format"),
        (rb"data:image/", "the text of a data URL"),
        (BLANK + rb"<(?:!DOCTYPE html|html|head|body)[\s>]", "a web page"),
        (rb"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-9]|SUkqA|TU0AK)[A-Za-z0-9+/\s]{20}", "an image as base64 text"),
        (rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{\[\d]", "JSON"), (rb"\s*<", "XML"),
    )
]  # fmt: skip
START_BYTES = 1000  # examined to name an unsupported file

# Keys in the `info` of a JPEG: Jpeg.bytes_at_any_scale, and whether only the end marker is missing.
BYTES_AT_ANY_SCALE = "bytes kept for each pixel at any scale"
LACKS_END = "complete except for the end marker"

# Python keeps the text of each warning that it has shown, and one file can cause thousands.
warnings.filterwarnings("ignore", module="PIL")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each core decodes another image


class UnsupportedFormat(Exception):
    """The file's format is not supported; the text says what it is ("a web page"), or is empty if unknown."""


class LimitedReads(io.BytesIO):
    """A file that allows MAX_READS reads, so that a header with a million parts is refused."""

    reads_left: float = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes. Raises Bomb."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise Bomb("a header with too many parts")
        return super().read(size)


def open_safely(data: bytes, formats: Collection[str], max_pixels: int) -> Image.Image:
    """Return the image in `data`, which has one of `formats`, without its metadata and not yet decoded.

    Raises UnsupportedFormat, Bomb, TooManyPixels (only for HEIC and AVIF), and any exception that Pillow raises.
    """
    form = next((form for pattern, form in SIGNATURES if pattern.match(data)), "")
    if form == HEIF and {"HEIC", "AVIF"}.isdisjoint(formats):
        form = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC"
    elif form == HEIF:
        data, form = strip_heif(data, max_pixels)
    if form not in formats:
        raise UnsupportedFormat(f"{'an' if form == 'AVIF' else 'a'} {form} image" if form else describe(data))
    image = OPENERS[form](data)
    for key in ("xmp", "XML:com.adobe.xmp"):  # Pillow would take an orientation from XMP
        image.info.pop(key, None)
    return image


def describe(data: bytes) -> str:
    """Return what an unsupported file is ("a web page"), or "" if unknown."""
    start = data[:START_BYTES]
    known = next((name for pattern, name in OTHER_FILES if pattern.match(start)), "")
    return known or ("text" if is_text(start) else "")


def is_text(start: bytes) -> bool:
    """Return whether the start of a file is readable text."""
    text = start.decode(errors="ignore")  # the last letter may be cut off
    return len(text.encode()) > len(start) - 4 and all(sign.isprintable() or sign.isspace() for sign in text)


def open_with_pillow(data: bytes, form: str) -> Image.Image:
    """Return the image in `data`, in the format `form`."""
    file = LimitedReads(data)
    image = Image.open(file, formats=[form])
    file.reads_left = math.inf  # the pixels may be in small pieces
    return image


def open_png(data: bytes) -> Image.Image:
    """Return the PNG in `data`, with IS_PLAIN in its info."""
    data, kinds = strip_png(data)
    image = open_with_pillow(data, "PNG")
    image.info[IS_PLAIN] = is_plain(data, kinds)
    return image


def open_bmp(data: bytes) -> Image.Image:
    """Return the BMP in `data`. Raises Bomb if it is large and run-length encoded."""
    image = open_with_pillow(data, "BMP")
    if image.info["compression"] in RLE and image.width * image.height > MAX_RLE_PIXELS:
        raise Bomb("run-length encoding that would take seconds")
    return image


def open_tiff(data: bytes) -> Image.Image:
    """Return the TIFF in `data` without its EXIF directories, which Pillow would parse and could fail on."""
    image = open_with_pillow(strip_tiff(data), "TIFF")
    image.info.pop("xmp", None)
    exif = image.getexif()
    for directory in set(TiffTags.TAGS_V2_GROUPS) & set(exif):
        del exif[directory]
    return image


def open_jpeg(data: bytes) -> Image.Image:
    """Return the JPEG in `data`, with BYTES_AT_ANY_SCALE and LACKS_END in its info.

    Not by Image.open(): it would limit the pixels of the full size, but a large JPEG is decoded at a smaller one.
    """
    jpeg = strip_jpeg(data)
    file = LimitedReads(jpeg.data)
    image = JpegImageFile(file)
    file.reads_left = math.inf
    image.info |= {BYTES_AT_ANY_SCALE: jpeg.bytes_at_any_scale, LACKS_END: jpeg.lacks_end}
    return image


class FirstFrame(WebPImageFile):
    """A WebP that frees its decoder after the first frame, since the decoder takes eight bytes per pixel."""

    def _get_next(self) -> tuple[bytes, int, int]:
        frame = super()._get_next()
        del self._decoder
        return frame


def open_heic(data: bytes) -> Image.Image:
    """Return the HEIC in `data`."""
    from pillow_heif import HeifImageFile, options  # noqa: PLC0415 - takes 4 MB, which many services never need

    options.DECODE_THREADS = 1
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    return cast(Image.Image, HeifImageFile(io.BytesIO(data)))  # type: ignore[no-untyped-call]


OPENERS: dict[str, Callable[[bytes], Image.Image]] = {
    "JPEG": open_jpeg, "PNG": open_png, "BMP": open_bmp, "TIFF": open_tiff, "HEIC": open_heic,
    "GIF": lambda data: open_with_pillow(strip_gif(data), "GIF"),
    "WEBP": lambda data: FirstFrame(io.BytesIO(strip_webp(data))),
    "AVIF": lambda data: AvifImagePlugin.AvifImageFile(io.BytesIO(data)),
}  # fmt: skip
