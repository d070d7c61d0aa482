"""JPEG files."""

import struct
from functools import cache

from PIL import Image
from samples import saved

from hostile.parts import CLAIM, SMALL, Maker, replaced, written
from hostile.tiff import LONG, ORIENTATION, RATIONAL, SHORT, Tag, make_tiff

COMMENT, EXIF, PROFILE, FRAME, PROGRESSIVE, SCAN, END = 0xFE, 0xE1, 0xE2, 0xC0, 0xC2, 0xDA, b"\xff\xd9"
EXIF_IFD, SUB_IFDS, X_RESOLUTION, RESOLUTION_UNIT = 34665, 330, 282, 296  # tags


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


@cache
def make_jpeg(mode: str = "RGB", progressive: bool = False) -> bytes:
    return saved(SMALL.convert(mode), "JPEG", progressive=progressive)


def jpeg_with(*parts: bytes, image: bytes | None = None) -> bytes:
    """A JPEG with these parts inserted after its first two bytes."""
    whole = make_jpeg() if image is None else image
    return whole[:2] + b"".join(parts) + whole[2:]


def exif(*tags: Tag, following: int = 0) -> bytes:
    return segment(EXIF, b"Exif\0\0" + make_tiff(tags, following=following))


def with_frame(offset: int, value: bytes) -> Maker:
    """A JPEG with `value` written `offset` bytes after the marker of its frame header."""
    return lambda: replaced(make_jpeg(), b"\xff\xc0", offset, value)


def claiming(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A JPEG whose header claims another size than its few pixels have."""
    mark = bytes([0xFF, PROGRESSIVE if progressive else FRAME])
    return replaced(make_jpeg(progressive=progressive), mark, 5, struct.pack(">HH", height, width))


def with_scans(side: int, scan: bytes) -> bytes:
    """A gray progressive JPEG with `scan` appended 500 times, or its own last scan if `scan` is empty."""
    whole = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    return whole[:-2] + (scan or whole[whole.rindex(b"\xff\xda") : -2]) * 500 + END


READABLE: dict[str, Maker] = {
    "garbage before the end": lambda: make_jpeg()[:-2] + b"rubbish" * 9 + END,
    "garbage after the end": lambda: make_jpeg() + b"\xff\xda" * 1000,
    "CMYK, inverted": lambda: make_jpeg("CMYK"),
    "YCCK": lambda: make_jpeg("CMYK").replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\2"),
    "RGB components": written("RGB", "JPEG", keep_rgb=True),
    "4:1:1 sampling": written("RGB", "JPEG", subsampling="4:1:1", quality=1),
    "restart markers": written("RGB", "JPEG", restart_marker_blocks=1),
    "progressive": lambda: make_jpeg(progressive=True),
    "padding": lambda: jpeg_with(segment(COMMENT, b""), b"\xff" * 100),
    "comment that looks like the start of a JPEG": lambda: jpeg_with(segment(COMMENT, b"\0\xff\xd8\xff" * 100)),
    "EXIF of garbage": lambda: jpeg_with(segment(EXIF, b"Exif\0\0" + b"\xee" * 200)),
    "empty EXIF": lambda: jpeg_with(segment(EXIF, b"Exif\0\0")),
    "EXIF that points to itself": lambda: jpeg_with(exif((EXIF_IFD, LONG, 1, 8), (SUB_IFDS, LONG, 1, 8), following=8)),
    "EXIF that claims billions of values": lambda: jpeg_with(
        exif((ORIENTATION, SHORT, 2**32 - 1, b"\0" * 8), (X_RESOLUTION, RATIONAL, 2**31, 0))
    ),
    "EXIF orientation 0": lambda: jpeg_with(exif((ORIENTATION, SHORT, 1, 0))),
    "EXIF orientation 9": lambda: jpeg_with(exif((ORIENTATION, SHORT, 1, 9))),
    "EXIF orientation in words": lambda: jpeg_with(exif((ORIENTATION, 2, 8, b"upright\0"))),
    "two EXIF orientations": lambda: jpeg_with(exif((ORIENTATION, SHORT, 2, b"\6\0\3\0"))),
    "resolution divided by 0": lambda: jpeg_with(
        exif((X_RESOLUTION, RATIONAL, 1, b"\0" * 8), (RESOLUTION_UNIT, SHORT, 1, 2))
    ),
    "broken profile": lambda: jpeg_with(segment(PROFILE, b"ICC_PROFILE\0\7\1rubbish")),
    "broken multi-picture index": lambda: jpeg_with(segment(0xE2, b"MPF\0" + b"II*\0\x08\0\0\0\xff\xff")),
    "several pictures (MPO)": written("RGB", "MPO", save_all=True, append_images=[SMALL.rotate(90)]),
    # Rare, but allowed by the standard. The data is still in Huffman codes, so the pixels are noise.
    "arithmetic coding": with_frame(0, b"\xff\xc9"),
}
BROKEN: dict[str, Maker] = {
    "no scan": lambda: make_jpeg()[: make_jpeg().index(b"\xff\xda")],
    "no frame header": lambda: b"\xff\xd8" + make_jpeg()[make_jpeg().index(b"\xff\xc4") :],
    "width 0": with_frame(7, b"\0\0"),
    "12 bits": with_frame(4, b"\x0c"),
    "lossless": with_frame(0, b"\xff\xc3"),
    "two components": with_frame(9, b"\2"),
    "hierarchical": with_frame(0, b"\xff\xc5"),
    "progressive, cut off": lambda: make_jpeg(progressive=True)[:-200],
    "two starts": lambda: b"\xff\xd8" + make_jpeg(),
}
SMALL_EXIF = segment(EXIF, b"Exif\0\0" + b"x" * 60)
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: claiming(CLAIM, CLAIM),
    # Its coefficients would take 770 MB at any scale.
    "progressive, 16,000 x 16,000 pixels": lambda: claiming(16_000, 16_000, progressive=True),
    "EXIF in 100,000 segments": lambda: jpeg_with(SMALL_EXIF * 100_000),
    # Pillow reads on after an end marker that precedes the first scan.
    "EXIF hidden after an end": lambda: jpeg_with(END, SMALL_EXIF * 100_000),
    # Pillow does not skip the content of the marker 0xC8.
    "EXIF hidden in an extension": lambda: jpeg_with((b"\xff\xc8\xff\xff" + SMALL_EXIF * 885) * 100),
    "4 MB of garbage": lambda: jpeg_with(segment(COMMENT, b""), b"\0" * 4_000_000),
    "4 MB of padding": lambda: jpeg_with(segment(COMMENT, b""), b"\xff" * 4_000_000),
    "a million empty comments": lambda: jpeg_with(segment(COMMENT, b"") * 1_000_000),
    # Pillow keeps a tuple for every three bytes.
    "200 long frame headers": lambda: jpeg_with(segment(FRAME, b"\x08\0\x08\0\x08\3" + b"\x01\x11\0" * 21_800) * 200),
    "200,000 quantization tables": lambda: jpeg_with(segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 200),
    "500 scans of all pixels": lambda: with_scans(2000, b""),
    "500 empty scans": lambda: with_scans(7000, segment(SCAN, b"\1\1\0\1\5\0")),
}
HARMLESS_BOMBS: dict[str, Maker] = {
    "profile of 8 MB": lambda: jpeg_with(
        *(segment(PROFILE, b"ICC_PROFILE\0" + bytes([i, 122]) + b"\0" * 65_000) for i in range(1, 123))
    ),
}
