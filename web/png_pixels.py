"""Decode plain PNG files with the Rust library of Chromium, by its binding kornia-rs, in a third of Pillow's time.

Pillow reads the header first, so its checks and our limits hold, and decodes every file that is not plain or that the
library refuses. So a file that Pillow reads never fails, and a broken file gets the same error as before.
"""

import io
import logging
import struct
from functools import cache
from typing import Any, cast

import numpy as np
from PIL import Image

from helpers import Pixels

log = logging.getLogger(__name__)

# The binding does not release the interpreter, which takes about 10 ms for a million pixels.
MAX_PIXELS = 2**22
IS_PLAIN = "8 bits, and no chunks that change pixels"  # key in the `info` of a PNG
HEADER = b"\0\0\0\x0dIHDR"
PLAIN_CHUNKS = ([b"IHDR", b"IDAT", b"IEND"], [b"IHDR", b"eXIf", b"IDAT", b"IEND"])
COLORS = {0: ("mono", "L"), 2: ("rgb", "RGB"), 6: ("rgba", "RGBA")}  # by IHDR's color type: kornia's and Pillow's mode


def is_plain(data: bytes, kinds: list[bytes]) -> bool:
    """Return whether a PNG has 8-bit gray, RGB or RGBA pixels, not interlaced, and no other chunks that matter.

    `kinds` are its chunks, with repeated ones counted once.
    """
    if data[8:16] != HEADER or len(data) < 29 or kinds not in PLAIN_CHUNKS:
        return False
    depth, color, _, _, interlaced = struct.unpack_from("5B", data, 24)
    return depth == 8 and color in COLORS and not interlaced


def decode_png(image: Image.Image) -> Pixels | None:
    """Return the pixels (height, width, channels) of a PNG that Pillow has opened; None if Pillow has to decode it."""
    library = png_library()
    if not image.info.get(IS_PLAIN) or image.width * image.height > MAX_PIXELS or not library:
        return None
    data = cast(io.BytesIO, image.fp).getvalue()  # type: ignore[attr-defined]
    mode, pillow_mode = COLORS[data[25]]
    if image.mode != pillow_mode:
        return None
    try:
        pixels = library.decode_image_png_u8(data, (image.height, image.width), mode)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # a panic in Rust
            raise
        log.debug("Pillow decodes a PNG, since kornia-rs refuses it: %s", error)
        return None
    return cast(Pixels, pixels)


@cache
def png_library() -> Any:
    """Return kornia-rs' functions; None, with a warning, if it is missing or decodes a known image differently."""
    known = np.random.default_rng(1).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(known).save(file, "PNG")
    try:
        import kornia_rs.io as library  # noqa: PLC0415 - a platform may lack it

        if np.array_equal(library.decode_image_png_u8(file.getvalue(), known.shape[:2], "rgb"), known):
            return library
        problem = "it decodes a known image differently"
    except Exception as error:
        problem = str(error)
    log.warning("Pillow decodes PNG files, which takes longer, since kornia-rs can't be used: %s", problem)
    return None
