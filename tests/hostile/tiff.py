"""TIFF files. EXIF has the same structure."""

import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image
from samples import saved

from hostile.parts import CLAIM, SMALL, Maker, written

Tag = tuple[int, int, int, bytes | int]  # number, type, count, and the values, or one value as an int

SHORT, LONG, RATIONAL, BYTES, SLONG8 = 3, 4, 5, 7, 17  # types
WIDTH, HEIGHT, BITS, COMPRESSION, INTERPRETATION, ORIENTATION, SAMPLES, PLANES = 256, 257, 258, 259, 262, 274, 277, 284
STRIP_OFFSETS, STRIP_ROWS, STRIP_LENGTHS = 273, 278, 279
TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_LENGTHS = 322, 323, 324, 325
X_RESOLUTION, EXIF_IFD, INTEROP_IFD, PROFILE = 282, 34665, 40965, 34675
DEFLATE = 8
PIXELS_AT = 1000  # where the pixels begin


def make_tiff(tags: Iterable[Tag], data: bytes = b"", order: str = "<", big: bool = False, following: int = 0) -> bytes:
    """A TIFF of one directory, followed by `data`. `following` is the offset of the next directory."""
    entries, values = [], b""
    tags = sorted(tags)
    start = (16 if big else 8) + (8 if big else 2) + len(tags) * (20 if big else 12) + (8 if big else 4)
    number, room = ("Q", 8) if big else ("I", 4)
    for tag, kind, count, value in tags:
        if isinstance(value, int):
            field = struct.pack(order + ("H" if kind == SHORT else number), value).ljust(room, b"\0")
        elif len(value) <= room:
            field = value.ljust(room, b"\0")
        else:
            field = struct.pack(order + number, start + len(values))
            values += value
        entries.append(struct.pack(order + "HH" + number, tag, kind, count) + field)
    name = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    counted = struct.pack(order + ("Q" if big else "H"), len(entries))
    return name + head + counted + b"".join(entries) + struct.pack(order + number, following) + values + data


def gray_tags(width: int, height: int, *more: Tag, compression: int = 1) -> list[Tag]:
    """The tags of a gray image; `more` override them."""
    values = {WIDTH: width, HEIGHT: height, BITS: 8, COMPRESSION: compression, INTERPRETATION: 1, SAMPLES: 1}
    tags: dict[int, Tag] = {tag: (tag, SHORT if tag > HEIGHT else LONG, 1, value) for tag, value in values.items()}
    return list((tags | {each[0]: each for each in more}).values())


def tiff_of_strip(
    width: int, height: int, data: bytes, *more: Tag, compression: int = 1, order: str = "<"
) -> bytes:  # fmt: skip
    """A gray TIFF whose only strip is `data`."""
    where = [(STRIP_OFFSETS, LONG, 1, PIXELS_AT), (STRIP_LENGTHS, LONG, 1, len(data)), *more]
    tags = gray_tags(width, height, *where, compression=compression)
    return make_tiff(tags, order=order).ljust(PIXELS_AT, b"\0") + data


def tiff_of_tile(side: int, tile: int, data: bytes, kind: int = LONG) -> bytes:
    """A gray deflated TIFF of `side` x `side` pixels, whose only tile is `data` and claims `tile` x `tile` pixels."""
    value: bytes | int = struct.pack("<q", tile) if kind == SLONG8 else tile
    where: list[Tag] = [
        (TILE_WIDTH, kind, 1, value), (TILE_HEIGHT, kind, 1, value), (TILE_OFFSETS, LONG, 1, PIXELS_AT),
        (TILE_LENGTHS, LONG, 1, len(data)),
    ]  # fmt: skip
    return make_tiff(gray_tags(side, side, *where, compression=DEFLATE)).ljust(PIXELS_AT, b"\0") + data


def gray(*tags: Tag, **options: Any) -> bytes:
    """A gray TIFF of 4 x 4 pixels with these tags."""
    return tiff_of_strip(4, 4, b"\x80" * 16, *tags, **options)


def deflated(width: int, height: int, data: bytes, *tags: Tag) -> bytes:
    return tiff_of_strip(width, height, zlib.compress(data), *tags, compression=DEFLATE)


def of_values(values: Any) -> Maker:
    return lambda: saved(Image.fromarray(values), "TIFF")


def frames(count: int) -> bytes:
    """A TIFF of `count` directories, each of which points to the next."""
    one = gray()[8:]
    at = [8 + i * len(one) for i in range(count + 1)]
    next_at = 2 + 8 * 12
    parts = [one[:next_at] + struct.pack("<I", at[i + 1]) + one[next_at + 4 :] for i in range(count)]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(parts)


def two_tile_widths() -> bytes:
    where: list[Tag] = [(TILE_HEIGHT, LONG, 1, 30_000), (TILE_OFFSETS, LONG, 1, PIXELS_AT), (TILE_LENGTHS, LONG, 1, 9)]
    tags = [*gray_tags(10, 10, *where, compression=DEFLATE), (TILE_WIDTH, SHORT, 1, 30_000), (TILE_WIDTH, LONG, 1, 16)]
    return make_tiff(tags).ljust(PIXELS_AT, b"\0") + zlib.compress(b"x")


def tile_width_in_words() -> bytes:
    """The width is a text: in Python, width times height would be a string of 4 GB."""
    where: list[Tag] = [(TILE_WIDTH, 2, 4, b"abcd"), (TILE_HEIGHT, LONG, 1, 2**30), (TILE_OFFSETS, LONG, 1, PIXELS_AT)]
    return make_tiff(gray_tags(10, 10, *where, compression=DEFLATE)).ljust(1100, b"\0")


def exif_of_a_million_values() -> bytes:
    """A tag in the EXIF directory has a million values."""
    inner = struct.pack("<HHHII", 1, 0x9204, RATIONAL, 1_000_000, 2000) + b"\0\0\0\0"
    whole = gray((EXIF_IFD, LONG, 1, 1500)).ljust(1500, b"\0") + inner
    return whole.ljust(2000, b"\0") + b"\0" * 8_000_000


def huge_bigtiff() -> bytes:
    whole = make_tiff(gray_tags(4, 4), big=True)
    return whole[:16] + b"\xff" * 8 + whole[24:] + b"\x01\0" * 4_000_000


def offsets(kind: int, size: int) -> bytes:
    """A million offsets of strips."""
    return make_tiff(
        gray_tags(2, 2, (STRIP_ROWS, LONG, 1, 1), (STRIP_OFFSETS, kind, 1_000_000, b"\0" * size * 1_000_000))
    )


RAMP = np.arange(64).reshape(8, 8)
COMPRESSIONS = {
    "tiff_lzw": "RGB", "tiff_adobe_deflate": "RGB", "packbits": "RGB", "jpeg": "RGB", "zstd": "RGB", "group4": "1",
    "group3": "1", "tiff_deflate": "L", "lzma": "L",
}  # fmt: skip
READABLE: dict[str, Maker] = {
    "big-endian": lambda: gray(order=">"),
    "BigTIFF": lambda: make_tiff(
        gray_tags(1, 1, (STRIP_OFFSETS, LONG, 1, 16), (STRIP_LENGTHS, LONG, 1, 1)), big=True
    ),
    "tiled": lambda: tiff_of_tile(10, 16, zlib.compress(b"\x80" * 256)),
    "one plane for each color": lambda: tiff_of_strip(
        4, 2, b"\x80" * 24, (INTERPRETATION, SHORT, 1, 2), (BITS, SHORT, 3, b"\x08\0" * 3), (SAMPLES, SHORT, 1, 3),
        (PLANES, SHORT, 1, 2), (STRIP_OFFSETS, LONG, 3, struct.pack("<III", 1000, 1008, 1016)),
        (STRIP_LENGTHS, LONG, 3, struct.pack("<III", 8, 8, 8)),
    ),
    "several pages": written("RGB", "TIFF", save_all=True, append_images=[SMALL.rotate(90)]),
    "directory followed by itself": lambda: make_tiff(
        gray_tags(4, 4, (STRIP_OFFSETS, LONG, 1, 8), (STRIP_LENGTHS, LONG, 1, 16)), following=8
    ),
    "LAB": lambda: saved(Image.new("LAB", (9, 9), (99, 9, 9)), "TIFF"),
    "YCbCr": written("YCbCr", "TIFF"),
    "zero is white": lambda: gray((INTERPRETATION, SHORT, 1, 0)),
    "palette": written("P", "TIFF"),
    "infinite floats": of_values(np.array([[np.nan, np.inf], [-np.inf, 1]], np.float32)),
    "only NaN": of_values(np.full((9, 9), np.nan, np.float32)),
    "largest floats": of_values(np.array([[3e38, -3e38], [0, 1]], np.float32)),
    "32 bits": of_values(RAMP.astype(np.int32) * 2**25),
    "32 bits, all values equal": of_values(np.full((9, 9), 7, np.int32)),
    "orientation 9": lambda: gray((ORIENTATION, SHORT, 1, 9)),
    "no strip length": lambda: make_tiff(gray_tags(4, 4, (STRIP_OFFSETS, LONG, 1, 8))),
    "EXIF beyond the file": lambda: gray((INTEROP_IFD, LONG, 1, 2**31), (EXIF_IFD, LONG, 1, 2**31)),
    "strip of 4 billion rows": lambda: gray((STRIP_ROWS, LONG, 1, 2**32 - 1)),
    **{f"compression {name}": written(mode, "TIFF", compression=name) for name, mode in COMPRESSIONS.items()},
}  # fmt: skip
BROKEN: dict[str, Maker] = {
    "width 0": lambda: tiff_of_strip(0, 4, b"\x80" * 16),
    "no size": lambda: make_tiff([(BITS, SHORT, 1, 8)]),
    "unknown compression": lambda: gray(compression=4242),
    "unknown interpretation": lambda: gray((INTERPRETATION, SHORT, 1, 77)),
    "strip beyond the file": lambda: gray((STRIP_OFFSETS, LONG, 1, 2**31)),
    "directory beyond the file": lambda: b"II*\0\xff\xff\xff\x7f" + b"\0" * 99,
    "directory in the header": lambda: b"II*\0\0\0\0\0" + b"\0" * 99,
}
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: deflated(CLAIM, CLAIM, b"\0" * 2**20),
    "tile much larger than the image": lambda: tiff_of_tile(10, 30_000, zlib.compress(b"x")),
    "tile size of a type that only libtiff reads": lambda: tiff_of_tile(10, 30_000, zlib.compress(b"x"), kind=SLONG8),
    "two tile widths": two_tile_widths,
    "tile width in words": tile_width_in_words,
    "strip that claims 2 GB": lambda: deflated(10, 10, b"\0" * 100, (STRIP_LENGTHS, LONG, 1, 2**31)),
    "40 million strips": lambda: deflated(1, 40_000_000, b"\0", (STRIP_ROWS, LONG, 1, 1)),
    "a million offsets": lambda: offsets(LONG, 4),
    "a million offsets of one byte": lambda: offsets(1, 1),
    "60,000 tags": lambda: make_tiff([*gray_tags(4, 4), *((1000 + i, LONG, 1, i) for i in range(60_000))]),
    "BigTIFF that claims 18 quintillion tags": huge_bigtiff,
}
HARMLESS_BOMBS: dict[str, Maker] = {
    "10,000 pages": lambda: frames(10_000),
    "pixels in the header, directory followed by itself": lambda: make_tiff(
        gray_tags(4, 4, (STRIP_OFFSETS, LONG, 1, 8), (STRIP_LENGTHS, LONG, 1, 16)), following=8
    ),
    "profile of 8 MB": lambda: gray((PROFILE, BYTES, 8_000_000, b"\0" * 8_000_000)),
    "profile that claims 4 GB": lambda: gray((PROFILE, BYTES, 2**32 - 1, b"\0" * 1000)),
    "strip much longer than the image": lambda: deflated(10, 10, b"\0" * 2**26, (STRIP_ROWS, LONG, 1, 2**26)),
    "a million resolutions": lambda: gray((X_RESOLUTION, RATIONAL, 1_000_000, b"\0" * 8_000_000)),
    "EXIF of a million values": exif_of_a_million_values,
}
