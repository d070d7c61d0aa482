"""BMP files."""

import struct

from hostile.jpeg import make_jpeg
from hostile.parts import CLAIM, Maker, written

GRAYS = b"".join(bytes([i, i, 255 - i, 0]) for i in range(0, 256, 16))
RLE8, RLE4, BIT_FIELDS, JPEG = 1, 2, 3, 4  # kinds of compression


def make_bmp(width: int, height: int, bits: int, data: bytes, *, compression: int = 0, palette: bytes = b"") -> bytes:
    start = 54 + len(palette)
    fields = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + fields + palette + data


READABLE: dict[str, Maker] = {
    "rows from top to bottom": lambda: make_bmp(4, -2, 24, b"\x80" * 24),
    "1 bit a pixel": written("1", "BMP"),
    "4 bits a pixel": lambda: make_bmp(8, 2, 4, b"\x12\x34\x56\x78" * 2, palette=GRAYS),
    "run lengths, 8 bits": lambda: make_bmp(4, 2, 8, b"\4\1\0\0\4\2\0\1", compression=RLE8, palette=GRAYS),
    "run lengths, 4 bits": lambda: make_bmp(4, 2, 4, b"\4\x12\0\0\4\x21\0\1", compression=RLE4, palette=GRAYS),
    "run lengths that jump": lambda: make_bmp(
        4, 4, 8, b"\1\1\0\2\1\1" + b"\0\0" + b"\4\1\0\0" * 2 + b"\0\1", compression=RLE8, palette=GRAYS
    ),
    "16 bits": lambda: make_bmp(2, 1, 16, b"\x12\x34" * 2),
    "16 bits with bit fields": lambda: make_bmp(
        2, 1, 16, b"\x12\x34" * 2, compression=BIT_FIELDS, palette=struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    ),
    "32 bits": lambda: make_bmp(2, 1, 32, b"\x80" * 8),
    "OS/2": lambda: b"BM" + struct.pack("<IHHIIHHHH", 38, 0, 0, 26, 12, 2, 2, 1, 24) + b"\x80" * 16,
}
BROKEN: dict[str, Maker] = {
    "width 0": lambda: make_bmp(0, 2, 24, b"\x80" * 24),
    "7 bits": lambda: make_bmp(2, 2, 7, b"\x80" * 24),
    "invalid bit fields": lambda: make_bmp(
        2, 1, 16, b"\x12\x34" * 2, compression=BIT_FIELDS, palette=b"\1\2\3\4" * 3
    ),
    "JPEG inside": lambda: make_bmp(60, 40, 24, make_jpeg(), compression=JPEG),
    "header of 4 GB": lambda: b"BM" + b"\0" * 12 + b"\xff" * 100,
}  # fmt: skip
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: make_bmp(CLAIM, CLAIM, 24, b"\0" * 1000),
    "2 billion x 2 billion pixels": lambda: make_bmp(2**31 - 1, 2**31 - 1, 32, b"\0" * 1000),
    "run lengths for 49 megapixels": lambda: make_bmp(
        7000, 7000, 4, (b"\xfa\x12" * 28 + b"\0\0") * 7000, compression=RLE4, palette=GRAYS
    ),
    # Pillow fills each line byte by byte.
    "line ends for 49 megapixels": lambda: make_bmp(
        7000, 7000, 8, b"\1\1\0\0" * 7000, compression=RLE8, palette=GRAYS
    ),
    "palette of 2 billion colors": lambda: make_bmp(4, 4, 8, b"\0" * 16).replace(
        b"\0" * 8 + b"\0" * 16, b"\xff\xff\xff\x7f" + b"\0" * 20
    ),
}  # fmt: skip
HARMLESS_BOMBS: dict[str, Maker] = {}
