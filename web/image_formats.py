"""Which files are images that the service takes, and what the others are: opened with nothing decoded."""

import io
import math
import re
import warnings
from collections.abc import Callable, Collection
from typing import cast

from PIL import AvifImagePlugin, Image, TiffTags
from PIL.JpegImagePlugin import JpegImageFile
from PIL.WebPImagePlugin import WebPImageFile

from web.heif_checks import heif_pixels
from web.image_checks import (
    MAX_READS,
    MAX_RLE_PIXELS,
    Bomb,
    gif_pixels,
    jpeg_pixels,
    png_pixels,
    tiff_pixels,
    webp_pixels,
)

HEIF = "HEIC or AVIF"  # until it is known which
SIGNATURES = [
    (re.compile(pattern, re.DOTALL), form)
    for pattern, form in (
        (rb"\xff\xd8\xff", "JPEG"), (rb"\x89PNG\r\n\x1a\n", "PNG"), (rb"GIF8[79]a", "GIF"), (rb"RIFF....WEBP", "WEBP"),
        (rb"BM", "BMP"), (rb"II\*\0|II\+\0|MM\0\*|MM\0\+|II\0\*|MM\*\0", "TIFF"),
        (rb"....ftyp(?:hei[cxms]|hev[cxms]|mif[12]|msf1|avi[fs])", HEIF),
    )
]  # fmt: skip
# What may stand ahead of an XML or HTML file's first element. Nothing in it is matched twice, which could take minutes.
BLANK = rb"(?:\xef\xbb\xbf)?(?>\s+|<\?xml[^>]*>|<!--.*?-->|<!DOCTYPE svg[^>]*>)*+"
# What people send besides, as the error names it.
OTHERS = [
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
LOOKED_AT = 1000  # bytes, to say what a file is that is not taken
RLE = (1, 2)  # of a BMP's ways of compression

# What is known of a JPEG, in the `info` of its image.
IN_FULL = "bytes kept for each pixel at any scale"
UNFINISHED = "has all scans, and no end"

# Python keeps the text of each warning that it has shown, and a file can make thousands of them.
warnings.filterwarnings("ignore", module="PIL")
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each core has an image of its own


class NotTaken(Exception):
    """The file is of no format that is taken; the text is what it is, with its article, or nothing."""


class FewReads(io.BytesIO):
    """A file that is read MAX_READS times at most, so that a header of a million parts is given up."""

    reads_left: float = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, as a file does. Raises Bomb."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise Bomb("a header of too many parts")
        return super().read(size)


def open_frugally(data: bytes, formats: Collection[str], max_pixels: int) -> Image.Image:
    """Return the image whose file is `data`, of one of `formats`, with nothing decoded and without its metadata.

    Raises NotTaken, Bomb, TooManyPixels (for HEIC and AVIF, whose size only we look for), and whatever Pillow does.
    """
    form = next((form for pattern, form in SIGNATURES if pattern.match(data)), "")
    if form == HEIF and {"HEIC", "AVIF"}.isdisjoint(formats):
        form = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC"
    elif form == HEIF:
        data, form = heif_pixels(data, max_pixels)
    if form not in formats:
        raise NotTaken(f"{'an' if form == 'AVIF' else 'a'} {form} image" if form else name_of(data))
    image = OPENERS.get(form, open_with_pillow)(data, form)
    for key in ("xmp", "XML:com.adobe.xmp"):  # in which Pillow would look for an orientation
        image.info.pop(key, None)
    return image


def name_of(data: bytes) -> str:
    """Return what a file is that is not taken, with its article, or nothing where that can't be told."""
    start = data[:LOOKED_AT]
    known = next((name for pattern, name in OTHERS if pattern.match(start)), "")
    return known or ("text" if is_text(start) else "")


def is_text(start: bytes) -> bool:
    """Whether a file that begins so can be read by people."""
    text = start.decode(errors="ignore")  # its last letter may be cut
    return len(text.encode()) > len(start) - 4 and all(sign.isprintable() or sign.isspace() for sign in text)


def open_with_pillow(data: bytes, form: str) -> Image.Image:
    """Return the PNG, GIF or BMP."""
    file = FewReads(PIXELS.get(form, bytes)(data))
    del data  # it is twice in the memory else
    image = Image.open(file, formats=[form])
    file.reads_left = math.inf  # pixels may come in small pieces
    if form == "BMP" and image.info["compression"] in RLE and image.width * image.height > MAX_RLE_PIXELS:
        raise Bomb("run-length encoding that takes seconds")
    return image


PIXELS: dict[str, Callable[[bytes], bytes]] = {
    "PNG": png_pixels, "GIF": gif_pixels, "TIFF": tiff_pixels,
}  # fmt: skip


class FirstFrame(WebPImageFile):
    """A WebP whose decoder goes when it has given its first frame: it keeps eight bytes for each pixel."""

    def _get_next(self) -> tuple[bytes, int, int]:
        frame = super()._get_next()
        del self._decoder
        return frame


def open_webp(data: bytes, _form: str) -> Image.Image:
    """Return the WebP."""
    file = io.BytesIO(webp_pixels(data))
    del data
    return FirstFrame(file)


def open_tiff(data: bytes, form: str) -> Image.Image:
    """Return the TIFF."""
    image = open_with_pillow(data, form)
    # Its plugin would read the camera's own directories when it loads, and fail where they are odd.
    image.info.pop("xmp", None)
    exif = image.getexif()
    for directory in set(TiffTags.TAGS_V2_GROUPS) & set(exif):
        del exif[directory]
    return image


def open_jpeg(data: bytes, _form: str) -> Image.Image:
    """Return the JPEG, with IN_FULL and UNFINISHED in its info.

    Not by Image.open(), which counts the pixels of the whole: a large one is decoded smaller.
    """
    jpeg = jpeg_pixels(data)
    del data
    file = FewReads(jpeg.data)
    image = JpegImageFile(file)
    file.reads_left = math.inf
    image.info |= {IN_FULL: jpeg.bytes_in_full, UNFINISHED: jpeg.all_scans and not jpeg.ended}
    return image


def open_heic(data: bytes, _form: str) -> Image.Image:
    """Return the HEIC."""
    from pillow_heif import HeifImageFile, options  # noqa: PLC0415 - 4 MB, which many services never need

    options.DECODE_THREADS = 1
    options.THUMBNAILS = options.DEPTH_IMAGES = options.AUX_IMAGES = False
    return cast(Image.Image, HeifImageFile(io.BytesIO(data)))  # type: ignore[no-untyped-call]


def open_avif(data: bytes, _form: str) -> Image.Image:
    """Return the AVIF."""
    return AvifImagePlugin.AvifImageFile(io.BytesIO(data))


OPENERS: dict[str, Callable[[bytes, str], Image.Image]] = {
    "JPEG": open_jpeg, "WEBP": open_webp, "TIFF": open_tiff, "HEIC": open_heic, "AVIF": open_avif,
}  # fmt: skip
