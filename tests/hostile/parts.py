"""Helpers to make files, used by the modules of several formats."""

import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image
from samples import colors, saved

Maker = Callable[[], bytes]

SMALL = Image.fromarray(colors(0, (60, 40)))
CLAIM = 50_000  # pixels, the width and height that a bomb claims to have


def written(mode: str, form: str, size: tuple[int, int] = (60, 40), **options: Any) -> Maker:
    """A file that Pillow itself writes."""
    return lambda: saved(SMALL.convert(mode).resize(size), "HEIF" if form == "HEIC" else form, **options)


def cut(make: Maker, percent: int) -> bytes:
    data = make()
    return data[: len(data) * percent // 100]


def replaced(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    """`data` with `value` written `offset` bytes after the start of the first `mark`."""
    at = data.index(mark) + offset
    return data[:at] + value + data[at + len(value) :]


def zeros(size: int) -> bytes:
    """`size` zeros, compressed, without holding them all in memory."""
    packer = zlib.compressobj(9)
    block = bytes(min(size, 2**20))
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()
