"""What a file may ask of Pillow: only its pixels, and only where its parts are no more and no larger than usual.

Pillow and the libraries below it are made to read every file that can be read. A service must also end: there are files
of a few bytes that take gigabytes, or minutes, before they are refused or give their pixels. Most of them hide in
metadata. A classifier needs none of it but the orientation, so metadata is cut out before Pillow sees the file. This
also lets photos through whose profiles or texts are broken or very large.

Here are the limits, and for each format a function that takes a whole file and returns it with nothing but its pixels
and its EXIF. heif_checks.py has the same for HEIC and AVIF.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

# Limits, all far above what cameras and editors write.
MAX_READS = 50_000  # calls of read for a header, which Pillow takes apart in Python: a microsecond each
MAX_CHUNKS = 50_000  # of a PNG or a WebP
MAX_SEGMENTS = 10_000  # of a JPEG
MAX_TABLES = 1_000  # of a JPEG: segments that are not metadata
MAX_TABLE_BYTES = 512 * 2**10  # of a JPEG: in those of its segments that Pillow takes apart
MAX_SCANS = 30  # of a JPEG: each goes over all pixels. Encoders write about ten
MAX_BLOCKS = 200_000  # of a GIF, ahead of its first frame: 50 MB of comments
MAX_TAGS = 4096  # of a TIFF
MAX_TAG_VALUES = 65_536  # of a TIFF: in one tag, such as the offsets of its strips
MAX_TILE_PIXELS = 2**20  # of a TIFF: in one tile, where the whole image is smaller
MAX_RLE_PIXELS = 2**21  # of a run-length encoded BMP, which Pillow decodes in Python: full HD
MAX_EXIF_BYTES = 2**20  # in which the web looks for the orientation
MAX_EXIF_SEGMENTS = 17  # of a JPEG: they hold MAX_EXIF_BYTES. Pillow joins them one by one
MAX_SHRUNK = 4  # times as many pixels may a JPEG have that is decoded smaller: phones make 200 megapixels
MAX_SIDE = 500_000  # pixels of a side: Pillow keeps a pointer for each row, and the resize a table for each column

PNG_AHEAD = {b"acTL", b"fcTL"}  # of an animation: where its first frame is
PNG_ONCE = {b"eXIf", *PNG_AHEAD}
WEBP_FRAMES = (b"ANMF", b"VP8 ", b"VP8L")
WEBP_PIXELS = (b"VP8X", b"ANIM", b"ALPH", *WEBP_FRAMES)
WEBP_PROFILE, WEBP_EXIF, WEBP_XMP = 0x20, 0x08, 0x04  # flags in VP8X: what the file has
GIF_EXTENSION, GIF_CONTROL = 0x21, 0xF9
BIG_TIFF = 43
TIFF_NUMBERS = (256, 257, 322, 323)  # width and height, of the image and of a tile
TIFF_OFFSETS = (273, 324)  # of strips, of tiles
# The tags that pixels depend on; all others are metadata.
TIFF_PIXELS = {*range(254, 267), 273, 274, 277, 278, 279, 284, *range(290, 294), 317, 320, 322, 323, 324, 325, 330, 332,
               338, 339, 347, *range(512, 522), *range(529, 533)}  # fmt: skip
WHOLE_NUMBERS = {3: "H", 4: "I", 16: "Q"}  # types of a TIFF's tag
PLAIN_BYTES = (1, 2, 7)  # types whose values Pillow keeps as they are
JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # but restarts, which stand among the pixels
DHT, JPG, DAC, EOI, SOS, COMMENT = 0xC4, 0xC8, 0xCC, 0xD9, 0xDA, 0xFE  # markers of a JPEG
FRAMES = set(range(0xC0, 0xD0)) - {DHT, JPG, DAC}
INTERLEAVED_FRAMES = (0xC0, 0xC1)  # baseline and extended, by Huffman's codes
END_OF_JPEG = b"\xff\xd9"


class Bomb(Exception):
    """The file is made to cost more than an image does; the text is for the log."""


class TooManyPixels(Exception):
    """The image is larger than the limit that was given."""


def without(data: bytes, cuts: list[tuple[int, int]], replaced: dict[int, bytes] | None = None) -> bytes:
    """Return `data` without the bytes from a to b of each of `cuts`, and with other bytes of the same length at places.

    Both are in order, and a cut contains no such place. The data is copied once, or not at all.
    """
    changes = [(start, end, b"") for start, end in cuts]
    changes += [(at, at + len(new), new) for at, new in (replaced or {}).items()]
    if not changes:
        return data
    whole, pieces, kept = memoryview(data), list[bytes | memoryview](), 0
    for start, end, new in sorted(changes):
        pieces += [whole[kept:start], new]
        kept = end
    return b"".join([*pieces, whole[kept:]])


def png_pixels(data: bytes) -> bytes:
    """Return the PNG with its pixels and a small EXIF. Raises Bomb at too many chunks."""
    at, cuts, kept = 8, list[tuple[int, int]](), set[bytes]()
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return without(data, cuts)
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind == b"IEND":
            return without(data, [*cuts, (min(end, len(data)), len(data))])
        once = kind in PNG_ONCE and kind not in kept and length <= MAX_EXIF_BYTES and has_right_crc(data, at, end)
        if kind[0] & 0x20 and kind.isalpha() and not once and kind != b"tRNS":
            cuts.append((at, min(end, len(data))))
        kept |= PNG_AHEAD if kind == b"IDAT" else {kind}
        at = end
    raise Bomb("too many PNG chunks")


def has_right_crc(data: bytes, at: int, end: int) -> bool:
    """Whether the PNG's chunk from `at` to `end` is what it was when its checksum was made."""
    return data[end - 4 : end] == struct.pack(">I", zlib.crc32(memoryview(data)[at + 4 : end - 4]))


def webp_pixels(data: bytes) -> bytes:
    """Return the WebP with its first frame and a small EXIF, of all its chunks."""
    at, pieces, flags_at = 12, list[bytes | memoryview](), None
    whole, framed, missing = memoryview(data), False, WEBP_PROFILE | WEBP_XMP | WEBP_EXIF
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        is_exif = kind == b"EXIF" and length <= MAX_EXIF_BYTES and end <= len(data) and missing & WEBP_EXIF
        if (kind in WEBP_PIXELS and not framed) or is_exif:
            if at + 8 + length > len(data):
                return data  # pixels are missing: libwebp says so
            flags_at = len(pieces) if kind == b"VP8X" and flags_at is None else flags_at
            framed = framed or kind in WEBP_FRAMES
            missing &= ~WEBP_EXIF if is_exif else 0xFF
            pieces.append(whole[at:end] if end <= len(data) else data[at:] + b"\0")
        at = end
    if flags_at is not None and len(pieces[flags_at]) >= 9:
        changed = bytearray(pieces[flags_at])
        changed[8] &= ~missing
        pieces[flags_at] = bytes(changed)
    return b"".join([b"RIFF", struct.pack("<I", 4 + sum(map(len, pieces))), b"WEBP", *pieces])


def gif_pixels(data: bytes) -> bytes:
    """Return the GIF without comments and the like ahead of its first frame. Raises Bomb at too many blocks."""
    if len(data) < 13:
        return data
    at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    cuts, blocks = list[tuple[int, int]](), 0
    while at + 2 < len(data) and data[at] == GIF_EXTENSION:
        start, label = at, data[at + 1]
        at += 2
        while at < len(data) and data[at] and blocks < MAX_BLOCKS:
            at += data[at] + 1
            blocks += 1
        at += 1
        blocks += 10  # it costs as much
        if blocks > MAX_BLOCKS:
            raise Bomb("too many GIF blocks")
        if label != GIF_CONTROL:
            cuts.append((start, min(at, len(data))))
    return without(data, cuts)


def tiff_pixels(data: bytes) -> bytes:
    """Return the TIFF with a single byte in place of the values of each large tag that is metadata.

    Raises Bomb at a tag of very many values, and at a tile out of proportion to the image. Pillow makes an object of
    each value, ten gigabytes of an upload's offsets; libtiff fills a whole tile of two gigabytes for a file of 134
    bytes.
    """
    order = "<" if data.startswith(b"II") else ">"
    big = data[2 if order == "<" else 3] == BIG_TIFF
    [at] = struct.unpack_from(order + "Q" if big else order + "I", data, 8 if big else 4)
    [tags] = struct.unpack_from(order + "Q" if big else order + "H", data, at)
    entry = struct.Struct(order + "HHQ8s" if big else order + "HHI4s")
    at += 8 if big else 2
    numbers, replaced = dict.fromkeys(TIFF_NUMBERS, 0), dict[int, bytes]()
    if tags > MAX_TAGS:
        raise Bomb(f"{tags} TIFF tags")
    entries = memoryview(data)[at : at + tags * entry.size]
    for tag, kind, count, value in entry.iter_unpack(entries[: len(entries) // entry.size * entry.size]):
        if count > MAX_TAG_VALUES and tag not in TIFF_PIXELS:
            replaced[at] = entry.pack(tag, 1, 1, b"")
        elif count > MAX_TAG_VALUES and (kind not in PLAIN_BYTES or tag in TIFF_OFFSETS):
            raise Bomb(f"{count} values in TIFF tag {tag}")
        if tag in numbers:
            if count != 1 or kind not in WHOLE_NUMBERS or numbers[tag]:  # of two, each reader could take another
                raise Bomb(f"TIFF tag {tag} is odd")
            [numbers[tag]] = struct.unpack_from(order + WHOLE_NUMBERS[kind], value)
        at += entry.size
    width, height, tile_width, tile_height = numbers.values()
    if tile_width * tile_height > max(width * height, MAX_TILE_PIXELS):
        raise Bomb("a TIFF tile out of proportion")
    return without(data, [], replaced)


class Segment(NamedTuple):
    """A part of a JPEG: its marker, where that begins, where what it says begins, and where the part ends."""

    marker: int
    start: int
    body: int
    end: int


class Jpeg(NamedTuple):
    """A JPEG without its metadata, and what its decoder has to do."""

    data: bytes
    bytes_in_full: float  # that libjpeg keeps for each pixel of the whole image, whatever the scale
    all_scans: bool  # whether they give each coefficient of each component
    ended: bool


def jpeg_pixels(data: bytes) -> Jpeg:
    """Return the JPEG without its metadata. Raises Bomb at too many segments or scans, up to the first image's end.

    Pillow joins EXIF segments one by one, so that many small ones take minutes, and takes apart tables that libjpeg has
    no use for.
    """
    cuts, exif, tables = list[tuple[int, int]](), [0], [0]
    frame, scans, ended = b"", list[bytes](), False
    for marker, start, body, end in jpeg_segments(data):
        if marker == EOI:
            ended = bool(scans)
        elif is_metadata(marker, data[body + 2 : body + 8]):
            cuts += [] if scans else [(start, min(end, len(data)))]
        elif marker == 0xE1 and (sum(exif) > MAX_EXIF_BYTES or len(exif) > MAX_EXIF_SEGMENTS):
            cuts += [(start, min(end, len(data)))]
        else:
            (exif if marker == 0xE1 else tables).append(end - start)
            frame = data[start + 1 : end] if marker in FRAMES and not frame else frame
            scans += [data[body:end]] if marker == SOS else []
        if len(scans) > MAX_SCANS or len(tables) > MAX_TABLES or sum(tables) > MAX_TABLE_BYTES:
            raise Bomb("too many JPEG segments")
    return Jpeg(without(data, cuts), bytes_in_full(frame, scans), gives_all(frame, scans), ended)


def jpeg_segments(data: bytes) -> Iterator[Segment]:
    """Yield the parts of a JPEG up to the end of its first image. Raises Bomb at too many."""
    at, scanned = 2, False
    for _ in range(MAX_SEGMENTS):
        found = JPEG_MARKER.search(data, at)
        if not found:
            return
        marker, body = found[1][0], found.end()
        length = int.from_bytes(data[body : body + 2], "big")
        at = body if marker == EOI else body + max(length, 2)
        yield Segment(marker, found.start(), body, at)
        if marker == EOI and scanned:  # ahead of the first scan Pillow passes over it
            return
        scanned = scanned or marker == SOS
    raise Bomb("too many JPEG segments")


def is_metadata(marker: int, start: bytes) -> bool:
    """Whether a JPEG's segment says nothing of the pixels: a comment, or of an application but JFIF, Adobe and EXIF."""
    known = {0xE0: b"JFIF\0", 0xE1: b"Exif\0\0", 0xEE: b"Adobe"}.get(marker)
    return marker == COMMENT or (0xE0 <= marker <= 0xEF and not (known and start.startswith(known)))


def bytes_in_full(frame: bytes, scans: list[bytes]) -> float:
    """Return how many bytes of each pixel libjpeg keeps at any scale: the coefficients, where scans add to each other.

    `frame` begins with its marker; 0.0 where a single scan has all, since a row is then forgotten when it is out.
    """
    sampling = [(each >> 4) * (each & 15) for each in frame[10::3]]
    single = scans and frame and frame[0] in INTERLEAVED_FRAMES and scans[0][2:3] == frame[8:9]
    return 0.0 if single or not sampling else 2 * sum(sampling) / max(*sampling, 1)


def gives_all(frame: bytes, scans: list[bytes]) -> bool:
    """Whether the scans give all 64 coefficients of each of the frame's components, to their last bit."""
    left = {component: [True] * 64 for component in frame[9::3]}
    for scan in scans:
        components, [first, last, bits] = scan[3 : 3 + 2 * scan[2] : 2], scan[-3:]
        for component in left.keys() & set(components):
            left[component][first : last + 1] = [bool(bits & 15)] * (last + 1 - first)
    return bool(left) and not any(any(each) for each in left.values())
