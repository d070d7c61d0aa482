"""WebP files."""

import struct

from PIL import Image
from samples import saved

from hostile.parts import SMALL, Maker, replaced, written
from hostile.tiff import ORIENTATION, SHORT, make_tiff

ANIMATED, HAS_EXIF, HAS_PROFILE = 2, 8, 32  # flags of the canvas
NO_PIXELS = b"\0" * 20
ANIMATION = (b"ANIM", b"\0" * 6)

Chunk = tuple[bytes, bytes]  # its kind and its data


def make_webp(*chunks: Chunk) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> Chunk:
    return b"VP8X", bytes([flags, 0, 0, 0]) + three_bytes(width - 1) + three_bytes(height - 1)


def three_bytes(number: int) -> bytes:
    return struct.pack("<I", number)[:3]


def pixels(image: Image.Image = SMALL) -> bytes:
    """The whole chunk that holds an image."""
    return saved(image, "WEBP", lossless=True)[12:]


def frame(width: int, height: int, content: bytes, *, at: bytes = b"\0" * 6, ending: bytes = b"\0\0\0\0") -> Chunk:
    """A frame of an animation."""
    return b"ANMF", at + three_bytes(width - 1) + three_bytes(height - 1) + ending + content


def with_chunk(kind: bytes, data: bytes, flag: int, *, first: bool = False) -> bytes:
    """A valid WebP with one more chunk."""
    image = (pixels()[:4], pixels()[8:])
    chunks = [(kind, data), image] if first else [image, (kind, data)]
    return make_webp(canvas(60, 40, flag), *chunks)


READABLE: dict[str, Maker] = {
    "lossy": written("RGB", "WEBP", quality=1),
    "lossless": written("RGB", "WEBP", lossless=True),
    "alpha": written("RGBA", "WEBP"),
    "animated": written("RGB", "WEBP", save_all=True, append_images=[SMALL.rotate(90)]),
    "profile, EXIF and XMP": written(
        "RGB", "WEBP", icc_profile=b"x" * 99, exif=make_tiff([(ORIENTATION, SHORT, 1, 6)]), xmp=b"<x/>"
    ),
    "EXIF of garbage": written("RGB", "WEBP", exif=b"\xee" * 99),
}
BROKEN: dict[str, Maker] = {
    "no chunk": make_webp,
    "canvas without pixels": lambda: make_webp(canvas(4, 4)),
    "animation without a frame": lambda: make_webp(canvas(4, 4, ANIMATED), ANIMATION),
    "frame outside the canvas": lambda: make_webp(
        canvas(4, 4, ANIMATED), ANIMATION, frame(60, 40, pixels(), at=b"\xff" * 6)
    ),
    "chunk that claims 4 GB": lambda: replaced(saved(SMALL, "WEBP"), b"VP8", 4, b"\xff" * 4),
}
BOMBS: dict[str, Maker] = {
    "lossless, 16,383 x 16,383 pixels": lambda: make_webp(
        (b"VP8L", b"\x2f" + struct.pack("<I", 0x3FFE | 0x3FFE << 14) + NO_PIXELS)
    ),
    "lossy, 16,383 x 16,383 pixels": lambda: make_webp(
        (b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383) + NO_PIXELS)
    ),
    "canvas 16 million pixels wide": lambda: make_webp(canvas(2**24, 200), (b"VP8L", b"\x2f" + NO_PIXELS)),
    # Almost twice Image.MAX_IMAGE_PIXELS: Pillow only warns, and creates its decoder.
    "canvas just below Pillow's own limit": lambda: make_webp(
        canvas(9999, 9999, ANIMATED), ANIMATION, frame(60, 40, pixels())
    ),
}
HARMLESS_BOMBS: dict[str, Maker] = {
    "10,000 frames": lambda: make_webp(
        canvas(4, 4, ANIMATED), ANIMATION,
        *[frame(4, 4, pixels(Image.new("RGB", (4, 4))), ending=b"\x0a\0\0\0")] * 10_000,
    ),
    "EXIF orientation of 4 million values": lambda: with_chunk(
        b"EXIF", make_tiff([(ORIENTATION, SHORT, 4_000_000, b"\0" * 8_000_000)]), HAS_EXIF
    ),
    "profile of 8 MB": lambda: with_chunk(b"ICCP", b"\0" * 8_000_000, HAS_PROFILE, first=True),
}  # fmt: skip
