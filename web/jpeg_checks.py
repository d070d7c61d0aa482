"""Remove metadata from JPEG files, refuse those that cost too much to read, and predict what decoding takes."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from web.image_checks import MAX_EXIF_BYTES, Bomb, edit

# Limits, all far above what cameras and editors write.
MAX_SEGMENTS = 10_000
MAX_TABLES = 1_000  # segments other than metadata
MAX_TABLE_BYTES = 512 * 2**10  # in segments that Pillow parses
MAX_SCANS = 30  # decoding passes over all pixels for each; encoders write about ten
MAX_EXIF_SEGMENTS = 17  # enough for MAX_EXIF_BYTES; Pillow joins them one by one

MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # all markers except restarts, which are among the pixels
DHT, JPG, DAC, EOI, SOS, EXIF, COMMENT = 0xC4, 0xC8, 0xCC, 0xD9, 0xDA, 0xE1, 0xFE
FRAMES = set(range(0xC0, 0xD0)) - {DHT, JPG, DAC}
INTERLEAVED_FRAMES = (0xC0, 0xC1)  # baseline and extended, Huffman-coded
USED_APPLICATION_DATA = {0xE0: b"JFIF\0", EXIF: b"Exif\0\0", 0xEE: b"Adobe"}


class Jpeg(NamedTuple):
    """A JPEG without its metadata, and what is known before decoding it."""

    data: bytes
    bytes_at_any_scale: float  # that libjpeg keeps per pixel of the full size, even if it decodes at a smaller one
    lacks_end: bool  # whether only the end marker is missing: the scans have every coefficient of every component


def strip_jpeg(data: bytes) -> Jpeg:
    """Return the JPEG without its metadata. Raises Bomb if its first image has too many segments or scans.

    Pillow would take minutes to join many small EXIF segments, and it also parses tables that libjpeg does not use.
    """
    cuts, exif, tables = list[tuple[int, int]](), [0], [0]
    frame, scans, has_end = b"", list[bytes](), False
    for marker, start, body, end in segments(data):
        if marker == EOI:
            has_end = bool(scans)
        elif is_metadata(marker, data[body + 2 : body + 8]):
            cuts += [] if scans else [(start, min(end, len(data)))]
        elif marker == EXIF and (sum(exif) > MAX_EXIF_BYTES or len(exif) > MAX_EXIF_SEGMENTS):
            cuts += [(start, min(end, len(data)))]
        else:
            (exif if marker == EXIF else tables).append(end - start)
            frame = data[start + 1 : end] if marker in FRAMES and not frame else frame
            scans += [data[body:end]] if marker == SOS else []
        if len(scans) > MAX_SCANS or len(tables) > MAX_TABLES or sum(tables) > MAX_TABLE_BYTES:
            raise Bomb("too many JPEG segments")
    return Jpeg(edit(data, cuts), bytes_at_any_scale(frame, scans), not has_end and is_complete(frame, scans))


def segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield each segment of the first image: its marker, and the offsets of its marker, content and end.

    Raises Bomb if there are too many.
    """
    at, scanned = 2, False
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, at)
        if not found:
            return
        marker, body = found[1][0], found.end()
        length = int.from_bytes(data[body : body + 2], "big")
        at = body if marker == EOI else body + max(length, 2)
        yield marker, found.start(), body, at
        if marker == EOI and scanned:  # Pillow skips an end marker before the first scan
            return
        scanned = scanned or marker == SOS
    raise Bomb("too many JPEG segments")


def is_metadata(marker: int, start: bytes) -> bool:
    """Return whether a segment is a comment, or application data other than JFIF, Adobe and EXIF."""
    used = USED_APPLICATION_DATA.get(marker)
    return marker == COMMENT or (0xE0 <= marker <= 0xEF and not (used and start.startswith(used)))


def bytes_at_any_scale(frame: bytes, scans: list[bytes]) -> float:
    """Return how many bytes per pixel libjpeg keeps at any scale: all coefficients, if several scans refine them.

    `frame` begins with its marker. Returns 0.0 if one scan has everything: then libjpeg drops each finished row.
    """
    sampling = [(each >> 4) * (each & 15) for each in frame[10::3]]
    single = scans and frame and frame[0] in INTERLEAVED_FRAMES and scans[0][2:3] == frame[8:9]
    return 0.0 if single or not sampling else 2 * sum(sampling) / max(*sampling, 1)


def is_complete(frame: bytes, scans: list[bytes]) -> bool:
    """Return whether the scans have all 64 coefficients of each component, to the last bit."""
    missing = {component: [True] * 64 for component in frame[9::3]}
    for scan in scans:
        components, [first, last, bits] = scan[3 : 3 + 2 * scan[2] : 2], scan[-3:]
        for component in missing.keys() & set(components):
            missing[component][first : last + 1] = [bool(bits & 15)] * (last + 1 - first)
    return bool(missing) and not any(any(each) for each in missing.values())
