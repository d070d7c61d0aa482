"""PNG files."""

import struct
import zlib

from PIL import Image

from hostile.parts import CLAIM, Maker, replaced, written, zeros
from hostile.tiff import ORIENTATION, SHORT, make_tiff

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ROWS = (b"\0" + b"\x80" * 12) * 4  # of 4 x 4 pixels in RGB


def chunk(kind: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A chunk with the right CRC, and optionally a wrong length."""
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data) if length is None else length) + kind + data + struct.pack(">I", crc)


def header(width: int, height: int, depth: int = 8, color: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))


def make_png(*chunks: bytes, rows: bytes = b"", end: bytes | None = None) -> bytes:
    """A PNG of these chunks, followed by `rows`, which are compressed here."""
    data = chunk(b"IDAT", zlib.compress(rows)) if rows else b""
    return SIGNATURE + b"".join(chunks) + data + (chunk(b"IEND") if end is None else end)


def png_with(*chunks: bytes, after: bytes = b"") -> bytes:
    """A valid PNG of 4 x 4 pixels, with `chunks` before its pixels and `after` after them."""
    return make_png(header(4, 4), *chunks, chunk(b"IDAT", zlib.compress(ROWS)), after)


def bad_crc(kind: bytes, data: bytes) -> bytes:
    return chunk(kind, data)[:-1] + b"!"


def of_16_bits(color: int, samples: int, *chunks: bytes) -> Maker:
    return lambda: make_png(header(2, 2, 16, color), *chunks, rows=(b"\0" + b"\x80\1" * 2 * samples) * 2)


def animated(frames: int) -> bytes:
    data = zlib.compress(ROWS)
    control = struct.pack(">IIIIHHBB", 4, 4, 0, 0, 1, 10, 0, 0)
    others = [
        chunk(b"fcTL", struct.pack(">I", 2 * i - 1) + control) + chunk(b"fdAT", struct.pack(">I", 2 * i) + data)
        for i in range(1, frames)
    ]
    first = chunk(b"fcTL", struct.pack(">I", 0) + control) + chunk(b"IDAT", data)
    return make_png(header(4, 4), chunk(b"acTL", struct.pack(">II", frames, 0)), first, *others)


READABLE: dict[str, Maker] = {
    "1 bit a pixel": written("1", "PNG"),
    "2 bits a pixel": lambda: make_png(header(8, 2, 2, 0), rows=b"\0\x1b\x1b" * 2),
    "4 bits a pixel with a palette": lambda: make_png(
        header(4, 2, 4, 3), chunk(b"PLTE", b"abcdef"), rows=b"\0\x01\x01" * 2
    ),
    "16 bits, RGB": of_16_bits(2, 3),
    "16 bits, RGBA": of_16_bits(6, 4),
    "16 bits, gray with alpha": of_16_bits(4, 2),
    "16 bits, one gray transparent": of_16_bits(0, 1, chunk(b"tRNS", b"\x80\1")),
    "16 bits, one color transparent": of_16_bits(2, 3, chunk(b"tRNS", b"\x80\1" * 3)),
    "interlaced": lambda: make_png(header(1, 1, interlace=1), rows=b"\0abc"),
    "index beyond the palette": lambda: make_png(header(2, 1, 8, 3), chunk(b"PLTE", b"abc"), rows=b"\0\0\xff"),
    "transparency longer than the palette": lambda: make_png(
        header(2, 1, 8, 3), chunk(b"PLTE", b"abc"), chunk(b"tRNS", b"\0\x80" * 2), rows=b"\0\0\0"
    ),
    "no end chunk": lambda: make_png(header(4, 4), rows=ROWS, end=b""),
    "data after the end": lambda: png_with() + b"<script>" * 100,
    "empty IDAT chunks": lambda: png_with(chunk(b"IDAT"), chunk(b"IDAT")),
    "animated": written("RGB", "PNG", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    "animated, first frame smaller than the image": lambda: make_png(
        header(4, 4), chunk(b"acTL", struct.pack(">II", 1, 0)),
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 2, 2, 1, 1, 1, 10, 0, 0)), rows=b"\0abcdef" * 2,
    ),
    "EXIF orientation 9": lambda: png_with(chunk(b"eXIf", make_tiff([(ORIENTATION, SHORT, 1, 9)]))),
    "empty EXIF": lambda: png_with(chunk(b"eXIf")),
    "broken profile": lambda: png_with(chunk(b"iCCP", b"x\0\0rubbish")),
    "text with a bad CRC": lambda: png_with(bad_crc(b"tEXt", b"a\0b")),
    "texts": lambda: png_with(chunk(b"tEXt", b"a\0b"), chunk(b"zTXt", b"a\0\0" + zeros(9)), chunk(b"iTXt", b"a")),
    "palette missing": lambda: make_png(header(2, 1, 8, 3), rows=b"\0\0\1"),  # Pillow takes the indices as grays
    "too few rows": lambda: make_png(header(4, 400), rows=b"\0" * 13),  # the rest is black
}  # fmt: skip
BROKEN: dict[str, Maker] = {
    "width 0": lambda: make_png(header(0, 4), rows=b"\0"),
    "height 0": lambda: make_png(header(4, 0), rows=b"\0"),
    "no pixels": lambda: make_png(header(4, 4)),
    "no header": lambda: make_png(rows=b"\0abc"),
    "header cut off": lambda: make_png(chunk(b"IHDR", b"\0\0\0\1")),
    "invalid bit depth": lambda: make_png(header(2, 2, 3, 2), rows=b"\0" * 99),
    "invalid filter": lambda: make_png(header(2, 1), rows=b"\x09abcdef"),
    "header with a bad CRC": lambda: replaced(png_with(), b"IHDR", 17, b"!!!!"),
    "transparency with a bad CRC": lambda: png_with(bad_crc(b"tRNS", b"a" * 6)),
    "transparency of odd length": lambda: png_with(chunk(b"tRNS", b"abc")),
    "invalid chunk name": lambda: png_with(chunk(b"\0\1\2\3")),
    "animation frames out of order": lambda: png_with(
        chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", struct.pack(">I", 7) + b"\0" * 22)
    ),
}
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: make_png(header(CLAIM, CLAIM), rows=b"\0" * 2**20),
    "one row of 3 million pixels": lambda: make_png(header(3_000_000, 1, 1, 0), rows=b"\0" * 375_001),
    "one column of 33 million pixels": lambda: make_png(header(1, 33_000_000), rows=b"\0\0\0\0"),
    "a million empty chunks": lambda: png_with(chunk(b"teSt") * 1_000_000),
    "a million empty IDAT chunks": lambda: png_with(chunk(b"IDAT") * 1_000_000),
    "chunk that claims 4 GB": lambda: png_with(chunk(b"tEXt", b"x\0" + b"y" * 1000, length=2**32 - 1)),
}
BROKEN_TEXT = chunk(b"zTXt", b"x\0\0" + zeros(2**20)[:-1] + b"x")  # costs no memory, only time
HARMLESS_BOMBS: dict[str, Maker] = {
    "rows of 1 GB after the last": lambda: make_png(header(4, 4), chunk(b"IDAT", zeros(2**30))),
    "animation of 10,000 frames": lambda: animated(10_000),
    "profile of 1 GB": lambda: png_with(chunk(b"iCCP", b"x\0\0" + zeros(2**30))),
    "300 profiles of 1 MB": lambda: png_with(chunk(b"iCCP", b"x\0\0" + zeros(2**20)) * 300),
    "text of 1 GB": lambda: png_with(chunk(b"iTXt", b"x\0\1\0\0\0" + zeros(2**30))),
    "300 texts of 1 MB": lambda: png_with(
        b"".join(chunk(b"zTXt", b"%d\0\0" % i + zeros(2**20)) for i in range(300))
    ),
    "texts that take four bytes a letter": lambda: png_with(
        *(chunk(b"iTXt", b"%d\0\1\0\0\0" % i + zlib.compress(b"\xf0\x9f\x98\x80" + b"a" * (2**20 - 4)))
          for i in range(99))
    ),
    "300 broken texts": lambda: png_with(BROKEN_TEXT * 300),
    "300 broken texts after the pixels": lambda: png_with(after=BROKEN_TEXT * 300),
    "EXIF orientation of 4 million values": lambda: png_with(
        chunk(b"eXIf", make_tiff([(ORIENTATION, SHORT, 4_000_000, b"\0" * 8_000_000)]))
    ),
}  # fmt: skip
