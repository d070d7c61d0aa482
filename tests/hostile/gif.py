"""GIF files."""

import struct

from hostile.parts import CLAIM, Maker, written

END = b";"
EMPTY_COMMENT = b"!\xfe\0"


def make_gif(width: int, height: int, *parts: bytes, colors: int = 2) -> bytes:
    """A GIF of these parts, with a palette of `colors` grays, or none if 0."""
    bits = max(colors.bit_length() - 2, 0)
    palette = b"".join(bytes([i * 60 % 256]) * 3 for i in range(2 << bits)) if colors else b""
    screen = struct.pack("<HHBBB", width, height, 0x80 | bits if colors else 0, 0, 0)
    return b"GIF89a" + screen + palette + b"".join(parts)


def frame(x: int, y: int, width: int, height: int, pixels: bytes = b"") -> bytes:
    """A frame at (x, y) with these encoded pixels, or with at most 300 black ones."""
    return b"," + struct.pack("<HHHHB", x, y, width, height, 0) + (pixels or black(min(width * height, 300)))


def black(count: int) -> bytes:
    """`count` black pixels in LZW codes of three bits; the dictionary is cleared before each pixel."""
    clear, pixel, end = 4, 0, 5
    codes = [clear, pixel] * count + [end]
    bits = sum(code << 3 * i for i, code in enumerate(codes))
    data = bits.to_bytes(len(codes) * 3 // 8 + 1, "little")
    return bytes([2, len(data)]) + data + b"\0"


READABLE: dict[str, Maker] = {
    "no palette": lambda: make_gif(2, 2, frame(0, 0, 2, 2), END, colors=0),
    "frame outside the screen": lambda: make_gif(2, 2, frame(50, 50, 2, 2), END),
    "frame larger than the screen": lambda: make_gif(1, 1, frame(0, 0, 2, 2), END),
    "no end": lambda: make_gif(2, 2, frame(0, 0, 2, 2)),
    "transparent": written("P", "GIF", transparency=0),
    "interlaced": written("P", "GIF", interlace=True),
    "transparent index beyond the palette": lambda: make_gif(2, 2, b"!\xf9\4\1\0\0\xff\0", frame(0, 0, 2, 2), END),
    "version 87a": lambda: b"GIF87a" + make_gif(2, 2, frame(0, 0, 2, 2), END)[6:],
}
BROKEN: dict[str, Maker] = {
    "no frame": lambda: make_gif(2, 2, END),
    "screen of 0 x 0 pixels": lambda: make_gif(0, 0, frame(0, 0, 0, 0), END),
    "frame of 0 x 0 pixels": lambda: make_gif(2, 2, frame(0, 0, 0, 0), END),
    "LZW codes of 13 bits": lambda: make_gif(2, 2, frame(0, 0, 2, 2, b"\x0d\2\x44\1\0"), END),
    "invalid LZW codes": lambda: make_gif(2, 2, frame(0, 0, 2, 2, b"\2\5\xff\xff\xff\xff\xff\0"), END),
}
BOMBS: dict[str, Maker] = {
    "50,000 x 50,000 pixels": lambda: make_gif(CLAIM, CLAIM, frame(0, 0, 4, 4)),
    "frame of 50,000 x 50,000 pixels": lambda: make_gif(4, 4, frame(0, 0, CLAIM, CLAIM)),
    "frame far outside the screen": lambda: make_gif(4, 4, frame(65535, 65535, 4, 4)),
    "a million empty comments": lambda: make_gif(4, 4, EMPTY_COMMENT * 1_000_000, frame(0, 0, 4, 4), END),
}
HARMLESS_BOMBS: dict[str, Maker] = {
    "10,000 frames": lambda: make_gif(4, 4, frame(0, 0, 4, 4) * 10_000, END),
    "8 MB of codes for 16 pixels": lambda: make_gif(
        4, 4, frame(0, 0, 4, 4, b"\x02" + (b"\xff" + b"\x44" * 255) * 32_000 + b"\0"), END
    ),
}
