"""What a file may ask of Pillow: it is opened only where its parts are no more and no larger than an image needs.

Pillow and the libraries below it are made to read every file that can be read. A service must also end: these are files
of a few bytes that took gigabytes, or minutes, before they were refused or gave their pixels.
"""

import io
import math
import re
import struct
import warnings

from PIL import Image, PngImagePlugin, TiffTags

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")

# Limits, all far above what cameras and editors write.
MAX_READS = 50_000  # calls of read for a header, which Pillow takes apart in Python: a microsecond each
MAX_CHUNKS = 50_000  # of a PNG
MAX_PACKED_CHUNKS = 100  # of a PNG: texts and colour profiles, each of which may unpack to a megabyte
MAX_SEGMENTS = 1_000  # of a JPEG
MAX_TABLE_BYTES = 512 * 2**10  # of a JPEG: in those of its segments that Pillow takes apart
MAX_SCANS = 30  # of a JPEG: each goes over all pixels. Encoders write about ten
MAX_TAG_VALUES = 65_536  # of a TIFF: in one tag, such as the offsets of its strips
MAX_TILE_PIXELS = 2**20  # of a TIFF: in one tile, where the whole image is smaller
MAX_RLE_PIXELS = 2**21  # of a run-length encoded BMP, which Pillow decodes in Python: full HD
MAX_EXIF_BYTES = 2**20  # in which the web looks for the orientation

BIG_TIFF = 43
TIFF_NUMBERS = (256, 257, 322, 323)  # width and height, of the image and of a tile
TIFF_OFFSETS = (273, 324)  # of strips, of tiles
WHOLE_NUMBERS = {3: "H", 4: "I", 16: "Q"}  # types of a TIFF's tag
PLAIN_BYTES = (1, 2, 7)  # types whose values Pillow keeps as they are
JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # but restarts, which stand among the pixels
SKIPPED_SEGMENT = re.compile(rb"\xff(?:[\xe0\xe2-\xec\xee\xef\xfe]|\xe1(?!..Exif\0\0))", re.DOTALL)
START_OF_SCAN, END_OF_JPEG = b"\xff\xda", b"\xff\xd9"
RLE = (1, 2)  # of a BMP's ways of compression

# Python keeps the text of each warning that it has shown, and a file can make thousands of them.
warnings.filterwarnings("ignore", module="PIL")
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20  # characters of up to four bytes; Pillow allows 64 million


class Bomb(Exception):
    """The file is made to cost more than an image does; the text is for the log."""


class FewReads(io.BytesIO):
    """A file that is read MAX_READS times at most, so that a header of a million parts is given up."""

    reads_left: float = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, as a file does. Raises Bomb."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise Bomb("a header of too many parts")
        return super().read(size)


def open_frugally(data: bytes) -> Image.Image:
    """Return the image whose file is `data`. Raises Bomb, and whatever Pillow does."""
    check_parts(data)
    file = FewReads(data)
    image = Image.open(file, formats=FORMATS)
    file.reads_left = math.inf  # pixels may come in small pieces
    if image.format == "TIFF":
        # Its plugin would read the camera's own directories when it loads, and fail where they are odd.
        exif = image.getexif()
        for directory in set(TiffTags.TAGS_V2_GROUPS) & set(exif):
            del exif[directory]
    if image.format == "BMP" and image.info["compression"] in RLE and image.width * image.height > MAX_RLE_PIXELS:
        raise Bomb("run-length encoding that takes seconds")
    return image


def check_parts(data: bytes) -> None:
    """Raise Bomb where the file has more or larger parts than any encoder writes, before Pillow takes them apart."""
    if data.startswith(b"\x89PNG"):
        check_png(data)
    elif data.startswith(b"\xff\xd8"):
        check_jpeg(data)
    elif data.startswith((b"II", b"MM")):
        check_tiff(data)


def check_png(data: bytes) -> None:
    """Raise Bomb at too many chunks: empty ones cost a microsecond each, packed ones a millisecond."""
    at, packed = 8, 0
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        packed += kind in (b"iCCP", b"iTXt", b"zTXt")
        if packed > MAX_PACKED_CHUNKS:
            break
        at += 12 + length
    raise Bomb("too many PNG chunks")


def check_jpeg(data: bytes) -> None:
    """Raise Bomb at too many segments or scans, up to the end of the first image.

    Pillow joins EXIF segments one by one, so that many small ones take minutes, and takes apart tables that libjpeg has
    no use for.
    """
    at, scans, table_bytes = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        marker = JPEG_MARKER.search(data, at)
        if not marker or (marker[0] == END_OF_JPEG and scans):
            return
        at = marker.end()
        if marker[0] == END_OF_JPEG:  # which Pillow passes over ahead of the first scan
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        scans += marker[0] == START_OF_SCAN
        table_bytes += 0 if SKIPPED_SEGMENT.match(data, at - 2) else length
        if scans > MAX_SCANS or table_bytes > MAX_TABLE_BYTES:
            break
        at += max(length, 2)
    raise Bomb("too many JPEG segments")


def check_tiff(data: bytes) -> None:
    """Raise Bomb at a tag of very many values, and at a tile out of proportion to the image.

    Pillow makes an object of each value, ten gigabytes of an upload's offsets; libtiff fills a whole tile of two
    gigabytes for a file of 134 bytes.
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2] == BIG_TIFF
    [at] = struct.unpack_from(order + "Q" if big else order + "I", data, 8 if big else 4)
    [tags] = struct.unpack_from(order + "Q" if big else order + "H", data, at)
    entry = struct.Struct(order + "HHQ8s" if big else order + "HHI4s")
    numbers = dict.fromkeys(TIFF_NUMBERS, 0)
    for tag, kind, count, value in entry.iter_unpack(data[at + (8 if big else 2) :][: tags * entry.size]):
        if count > MAX_TAG_VALUES and (kind not in PLAIN_BYTES or tag in TIFF_OFFSETS):
            raise Bomb(f"{count} values in TIFF tag {tag}")
        if tag in numbers:
            if count != 1 or kind not in WHOLE_NUMBERS or numbers[tag]:  # of two, each reader could take another
                raise Bomb(f"TIFF tag {tag} is odd")
            [numbers[tag]] = struct.unpack_from(order + WHOLE_NUMBERS[kind], value)
    width, height, tile_width, tile_height = numbers.values()
    if tile_width * tile_height > max(width * height, MAX_TILE_PIXELS):
        raise Bomb("a TIFF tile out of proportion")
